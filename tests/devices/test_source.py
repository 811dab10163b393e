"""What the lines of a step must not say, for they make the host wait; seen without any device."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lightning_mtl

ROOT = Path(lightning_mtl.__file__).parent
OF_A_STEP = ("gradients", "learning_rates", "method", "training", "weighting")
# Between ranks, which wait for each other anyway; once a validation, and once in the first epoch.
ALLOWED = {
    "gradients/rows.py": 1,
    "training/absent.py": 2,
    "training/losses.py": 1,
    "training/observation.py": 3,
    "weighting/dtp.py": 1,
    "learning_rates/importance.py": 1,
}


def copies(tree: ast.AST) -> Iterator[int]:
    """Lines that make a tensor on a device of numbers of the host: ``new_tensor``, ``torch.tensor(device=...)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            named = any(keyword.arg == "device" for keyword in node.keywords)
            if node.func.attr == "new_tensor" or (node.func.attr in ("tensor", "as_tensor") and named):
                yield node.lineno


def test_numbers_reach_a_device_by_one_function() -> None:
    found = {}
    for folder in OF_A_STEP:
        for path in sorted((ROOT / folder).glob("*.py")):
            if lines := list(copies(ast.parse(path.read_text(encoding="utf-8")))):
                found[str(path.relative_to(ROOT).as_posix())] = lines
    assert {name: len(lines) for name, lines in found.items()} == ALLOWED, found
    assert list(copies(ast.parse("x.new_tensor([1]); torch.tensor(1, device=d); torch.tensor(1)"))) == [1, 1]
