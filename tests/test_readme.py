"""What the READMEs and the pages of docs/ say works: their Python runs, the commands, names and links in them exist."""

from __future__ import annotations

import doctest
import functools
import importlib.util
import os
import pkgutil
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import quickstart

ROOT = Path(__file__).parent.parent
# Built pages, and copies of pages that are listed themselves, lie in folders that git ignores.
DOCS = sorted(path for path in (ROOT / "docs").rglob("*.md") if not {"generated", "_build"} & set(path.parts))
PAGES = ("README.md", "CONTRIBUTING.md", "examples/README.md", *(path.relative_to(ROOT).as_posix() for path in DOCS))
PYTHON, SHELL = {"python", "py", "pycon"}, {"bash", "sh", "shell", "console"}
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
DOTTED = re.compile(r"`(lightning_mtl(?:\.\w+)+)`")
CONTINUES = re.compile(r"^<!-- continues: (\S+) -->$", re.MULTILINE)
NEEDS = re.compile(r"^<!-- needs: (\w+) -->$", re.MULTILINE)
INLINE = re.compile(r"`[^`\n]+`")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its code, and the line of the page that it begins on."""

    language: str
    code: str
    line: int


def blocks_of(page: str, languages: set[str]) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
        found.append(Block(match["language"], code, text.count("\n", 0, match.start()) + 2))
    return [block for block in found if block.language in languages]


def run_blocks(page: str, names: dict[str, Any]) -> None:
    """Run a page's blocks in one namespace, as a reader goes through it."""
    for block in blocks_of(page, PYTHON):
        if ">>> " in block.code:
            parsed = doctest.DocTestParser().get_doctest(block.code, names, page, page, block.line - 1)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert runner.run(parsed, clear_globs=False).failed == 0
            names.update(parsed.globs)
        else:
            # Empty lines before it make a traceback name the page's own line.
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), names)


@functools.cache
def names_after(page: str) -> dict[str, Any]:
    """What a page's blocks leave, run once for all pages that continue it."""
    module = sys.modules["page"] = ModuleType("page")  # where dataclasses and pickle look
    here = Path.cwd()
    os.chdir(tempfile.mkdtemp())  # its logs are used by nobody, but a Trainer remembers where they lie
    try:
        run_blocks(page, vars(module))
    finally:
        os.chdir(here)
    return vars(module)


# What torch's Adagrad says of any sparse gradient.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what they log stays out of the repository
    monkeypatch.delenv("LIGHTNING_MTL_DATA", raising=False)
    text = (ROOT / page).read_text(encoding="utf-8")
    for needed in NEEDS.findall(text):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    module = ModuleType("page")
    if before := CONTINUES.search(text):
        target = os.path.normpath(Path(page).parent / before[1])
        vars(module).update(names_after(target))
    monkeypatch.setitem(sys.modules, "page", module)
    run_blocks(page, vars(module))


def commands_of(page: str) -> list[list[str]]:
    lines = "\n".join(block.code for block in blocks_of(page, SHELL)).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def make_targets() -> set[str]:
    rules = re.findall(r"^([a-z][a-z -]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return {target for rule in rules for target in rule.split()}


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_targets_files_options_and_extras_that_exist(page: str) -> None:
    extras = set(metadata("lightning-mtl").get_all("Provides-Extra") or ())
    for words in commands_of(page):
        if words[0] == "make":
            asked = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
            assert asked <= make_targets(), words
        for word in words:
            if re.match(r"(examples|tests|benchmarks|lightning_mtl)/", word):
                assert (ROOT / word.split("::")[0]).exists(), words
            if word.startswith("DEMO_ARGS="):
                quickstart.parse(shlex.split(word.removeprefix("DEMO_ARGS=")))
        if "examples/quickstart.py" in words and "--help" not in words:
            quickstart.parse(words[words.index("examples/quickstart.py") + 1 :])
        if "pip" in words:
            named = {extra for group in re.findall(r"\[([\w, -]+)\]", " ".join(words)) for extra in group.split(",")}
            assert named <= extras, words


def anchors_of(path: Path) -> set[str]:
    """What links to a page's headings end in, as GitHub and MyST make it."""
    headings = HEADING.findall(FENCE.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    text = INLINE.sub("", FENCE.sub("", (ROOT / page).read_text(encoding="utf-8")))
    for match in LINK.finditer(text):
        path = (ROOT / page).parent / match["path"] if match["path"] else ROOT / page
        assert path.exists(), match[0]
        if match["anchor"]:
            assert match["anchor"] in anchors_of(path), match[0]


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_exist(page: str) -> None:
    for path in DOTTED.findall((ROOT / page).read_text(encoding="utf-8")):
        assert pkgutil.resolve_name(path) is not None


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 14_000


def test_python_and_shell_blocks_are_found_where_they_are() -> None:
    """Guards the tests above against a page whose blocks they would overlook."""
    for page in PAGES:
        fences = re.findall(r"^ *```(\w+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(blocks_of(page, PYTHON | SHELL)) == sum(name in PYTHON | SHELL for name in fences)


def test_no_message_sends_to_an_index_for_this_package() -> None:
    """It is not published: what an index has by this name is somebody else's."""
    asks = re.compile(r"pip install\s+['\"`]*lightning[-_]mtl(?!\[[\w,]+\] @ git)")
    sources = [path for folder in ("lightning_mtl", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    for path in (*sources, *(ROOT / page for page in PAGES), ROOT / "examples/search/README.md"):
        assert not asks.search(path.read_text(encoding="utf-8")), path
