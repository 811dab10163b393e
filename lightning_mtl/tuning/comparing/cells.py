"""What the cells of a comparison's tables say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_mtl.monitors.tables import Cell, marked
from lightning_mtl.paired import Difference


def nothing(itself: bool) -> str:
    """Return what stands for no difference: 0 of a row from itself, a dash for one that is not known yet."""
    return "0" if itself else "–"


def corrected(difference: Difference) -> Cell:
    """Write a difference, and mark it only where it holds after the correction."""
    text = marked(difference.interval, lower_is_better=True, beyond=False).text
    if not difference.significant:
        return Cell(text)
    return Cell(text, "better" if difference.interval.mean < 0 else "worse")


def counted(number: int, what: str) -> str:
    """Write a number of things.

    Example:
        >>> counted(1, "seed"), counted(5, "seed")
        ('1 seed', '5 seeds')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def rates_text(rates: Sequence[float], at_edge: Sequence[bool], tasks: Iterable[str]) -> str:
    """Write a row's learning rates, a star at those at an edge; with the tasks' names where tasks have unlike ones.

    Example:
        >>> rates_text((0.1, 0.01), (True, False), ["power", "icing"])
        'power 0.1*, icing 0.01'
        >>> rates_text((0.1, 0.1), (False, False), ["power", "icing"])
        '0.1'
    """
    told = [f"{rate:g}{'*' if edge else ''}" for rate, edge in zip(rates, at_edge, strict=True)]
    if len(set(told)) > 1:
        return ", ".join(f"{task} {one}" for task, one in zip(tasks, told, strict=True))
    return told[0] if told else "–"
