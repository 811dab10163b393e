"""What the READMEs say works: their Python runs, the commands, files and links they name exist."""

from __future__ import annotations

import doctest
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from types import ModuleType

import pytest

import quickstart

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/control.md", "examples/README.md")
PYTHON, SHELL = {"python", "py", "pycon"}, {"bash", "sh", "shell", "console"}
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^ *```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)(?P<path>[^)#\s]+)")


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


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what they log stays out of the repository
    monkeypatch.delenv("LIGHTNING_MTL_DATA", raising=False)
    # One namespace a page, as a reader goes through it; in sys.modules, where dataclasses and pickle look.
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks_of(page, PYTHON):
        if ">>> " in block.code:
            parsed = doctest.DocTestParser().get_doctest(block.code, vars(module), page, page, block.line - 1)
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert runner.run(parsed, clear_globs=False).failed == 0
            vars(module).update(parsed.globs)
        else:
            # Empty lines before it make a traceback name the page's own line.
            exec(compile("\n" * (block.line - 1) + block.code, page, "exec"), vars(module))


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


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for match in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
        assert (folder / match["path"]).exists(), match["path"]


def test_python_and_shell_blocks_are_found_where_they_are() -> None:
    """Guards the tests above against a page whose blocks they would overlook."""
    for page in PAGES:
        fences = re.findall(r"^ *```(\w+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(blocks_of(page, PYTHON | SHELL)) == sum(name in PYTHON | SHELL for name in fences)
