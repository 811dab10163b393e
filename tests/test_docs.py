"""The documentation: every public name has an entry, the site builds without a warning, its links lead somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import lightning_mtl
from lightning_mtl import weighting

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


# FromTorchJD is not installed where methods are timed, NTKWeighting needs residuals.
UNTIMED = ("FromTorchJD", "NTKWeighting")


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the site's extensions by its name."""
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    return importlib.import_module


def exported() -> dict[str, Any]:
    """``{path: object}`` of every name that a module of the package exports."""
    modules = [info.name for info in pkgutil.walk_packages(lightning_mtl.__path__, "lightning_mtl.")]
    found: dict[str, Any] = {}
    # All but two names of `configured` are the command line's own.
    for name in ("lightning_mtl", *(name for name in modules if not name.endswith(("__main__", ".configured")))):
        module = importlib.import_module(name)
        found |= {f"{name}.{public}": getattr(module, public) for public in getattr(module, "__all__", ())}
    return found


def test_every_public_name_has_an_entry(extension: Any) -> None:
    entries = [entry for _, found in extension("public_names").pages().values() for entry in found]
    documented = {id(entry.value) for entry in entries}
    missing = [path for path, value in exported().items() if id(value) not in documented]
    assert not missing
    paths = [entry.path for entry in entries]
    assert len(paths) == len(set(paths))
    assert [entry.path for entry in entries if not entry.summary] == []


def test_every_method_says_when_to_take_it_and_what_it_costs(extension: Any) -> None:
    facts = extension("method_facts")
    costs = facts.read_costs()
    for method in facts.methods():
        assert facts.when(method.name).endswith("."), method.name
        assert facts.cost(method.name, costs) or method.name in UNTIMED, method.name
    assert facts.cost("MGDA features", {"MGDA features": {"mlp": 1.26, "conv": 1.0}}) == "1.3 / 1.0"
    assert facts.cost("MGDA", {}) == ""


@pytest.mark.slow
def test_the_table_of_methods_is_that_of_today(extension: Any) -> None:
    """``make docs`` writes it."""
    page = (DOCS / "methods" / "index.md").read_text(encoding="utf-8")
    assert extension("method_facts").with_table(page) == page
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(weighting.__all__)


class Links(HTMLParser):
    """The addresses that a page leads to, and the places in it that others may lead to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and name in ("href", "src"):
                self.targets.append(value)
            if value and name in ("id", "name"):
                self.anchors.add(value)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    if importlib.util.find_spec("sphinx") is None or importlib.util.find_spec("myst_nb") is None:
        pytest.skip("needs the extra docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = {path: Links(path) for path in tmp_path.rglob("*.html")}
    broken = []
    for page, links in pages.items():
        if "_modules" in page.parts:  # viewcode's, whose way back misses functions documented under another module
            continue
        for target in links.targets:
            address = urlsplit(target)
            if address.scheme or address.netloc:
                continue
            path = (page.parent / unquote(address.path)).resolve() if address.path else page
            known = pages[path].anchors if path in pages else None
            anchor = unquote(address.fragment)
            if not path.exists() or (anchor and known is not None and anchor not in known):
                broken.append(f"{page.relative_to(tmp_path)}: {target}")
    assert not broken
    entries = (tmp_path / "generated" / "api").glob("*.html")
    methods = (tmp_path / "generated" / "methods").glob("*.html")
    anchors = set().union(*(pages[path].anchors for path in (*entries, *methods)))
    at_the_root = {id(getattr(lightning_mtl, name)) for name in lightning_mtl.__all__}
    inner = {path for path, value in exported().items() if path.count(".") > 1 and id(value) not in at_the_root}
    rooms = {path for path in inner if path.count(".") == 2}
    assert rooms | {f"lightning_mtl.{name}" for name in lightning_mtl.__all__} <= anchors


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Of Jupyter's own: nothing of ours runs in this process.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning", "ignore::ResourceWarning")
def test_notebooks_run_and_say_what_they_show(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    client.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = json.dumps([cell.get("outputs", ()) for cell in notebook.cells])
    assert shown.count("image/png") >= 1
    if path.stem == "negative_transfer":
        assert "[['left', 'left_odd'], ['right', 'right_odd']]" in shown
        assert "hurt: ['left', 'left_odd', 'right', 'right_odd']" in shown


def test_notebooks_hold_their_outputs() -> None:
    """The site and GitHub show them as they are; ``make notebooks`` renews them."""
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))
