"""What a mutation is: one slip in one line of the package, and the tests that have to notice it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    """A slip that somebody could make.

    Attributes:
        slip: What is wrong with the mutant, in words.
        file: Below ``lightning_mtl``.
        old: Text that occurs once in the file, mostly a part of a line.
        new: What stands there instead.
        tests: A file of tests, from the repository's root.
        keyword: Which of them, by ``pytest -k``; empty for all.
    """

    slip: str
    file: str
    old: str
    new: str
    tests: str
    keyword: str = ""

    def path(self, root: Path) -> Path:
        return root / "lightning_mtl" / self.file

    def apply(self, root: Path) -> None:
        """Change the file in the tree at ``root``."""
        path = self.path(root)
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")

    def complaints(self) -> Iterator[str]:
        """Why it cannot be applied to this tree, or its tests not be run."""
        if not (ROOT / self.tests).is_file():
            yield f"{self.slip}: {self.tests} does not exist; name the file with the tests that notice the slip."
        if not self.path(ROOT).is_file():
            yield f"{self.slip}: lightning_mtl/{self.file} does not exist; name the file that has the line now."
            return
        text = self.path(ROOT).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            yield f"{self.slip}: {self.old!r} occurs {count} times in lightning_mtl/{self.file}, and must once."
            return
        try:
            ast.parse(text.replace(self.old, self.new))
        except SyntaxError as error:
            yield f"{self.slip}: {self.new!r} in lightning_mtl/{self.file} is no Python: {error}."
