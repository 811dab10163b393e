"""What a long benchmark has done, in a file from which the next start goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.step_time import environment

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def measured(path: Path | None, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read the results that the file has from the same machine and versions."""
    found = json.loads(path.read_text()) if path is not None and path.exists() else {}
    same = all(found.get(name) == about[name] for name in ("machine", "versions", "threads"))
    return list(found["results"]) if same else []


class Store:
    """The trainings that are done, in a file that is whole at any moment.

    Args:
        path: The file; None keeps them in memory.
        about: What the file says of the run beside the machine.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.about: dict[str, Any] = environment() | dict(about or {})
        self.results: list[dict[str, Any]] = []
        if path is not None and path.exists():
            held = json.loads(path.read_text())
            self.results = held.pop("results")
            self.about = held

    def find(self, cell: DataclassInstance) -> dict[str, Any] | None:
        """What a cell has come to, if it is done."""
        wanted = asdict(cell)
        return next((r for r in self.results if all(r[name] == value for name, value in wanted.items())), None)

    def add(self, result: dict[str, Any]) -> None:
        """Keep a result, and write all, one a line."""
        self.results.append(result)
        if self.path is not None:
            beside = self.path.with_suffix(".part")
            head = json.dumps({**self.about, "results": None}, indent=1)
            rows = ",\n".join(f"  {json.dumps(one)}" for one in self.results)
            beside.write_text(head.replace("null\n}", f"[\n{rows}\n ]\n}}\n"))
            beside.replace(self.path)
