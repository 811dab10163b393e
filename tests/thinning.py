"""Parameters of which some run with the slow tests: cases that differ little from their neighbors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], every: int = 2) -> list[Any]:
    """Parameters: the first of each ``every`` values runs with the fast tests, the others with the slow ones.

    A value may be a ``pytest.param``, or a tuple for several names.
    """
    found = []
    for number, value in enumerate(values):
        param = value if hasattr(value, "marks") else pytest.param(*value) if isinstance(value, tuple) else None
        param = pytest.param(value) if param is None else param
        marks = [*param.marks, pytest.mark.slow] if number % every else param.marks
        found.append(pytest.param(*param.values, marks=marks, id=param.id))
    return found
