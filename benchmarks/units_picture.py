"""The picture of ``units.py``: errors over the scale of one loss, and the best of n random weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.units_outcome import Outcome
from benchmarks.units_rows import DECADES, EQUAL, INITIAL, SIMPLEX, STANDARDIZED, TUNED

STYLES = {
    EQUAL: ("black", "-"),
    TUNED: ("black", "--"),
    STANDARDIZED: ("C2", "-"),
    INITIAL: ("C2", "--"),
}
COLORS = ("C0", "C1", "C3", "C4", "C5", "C6", "C8", "C9")
LINES = ("-", ":")
COMPARED = (EQUAL, STANDARDIZED, "NashMTL", "ScaleInvariant", "UncertaintyWeighting")  # beside the budget's curves


def style(row: str, rows: list[str]) -> dict[str, Any]:
    """A row's color and line, the same in both pictures."""
    index = [one for one in rows if one not in STYLES].index(row) if row not in STYLES else 0
    color, line = STYLES.get(row, (COLORS[index % len(COLORS)], LINES[index // len(COLORS) % len(LINES)]))
    return {"color": color, "linestyle": line}


def draw(outcome: Outcome, path: Path) -> None:
    """Draw each row's error over the scale and the budget's curves, the spread of the seeds as bands."""
    table = outcome.table()
    if not table:
        return
    rows = list(dict.fromkeys(row for row, _ in table))
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    adam, sgd, budget = figure.subplots(1, 3, sharey=True)
    for axes, optimizer in ((adam, "Adam"), (sgd, "SGD")):
        for (row, own), by in table.items():
            if own == optimizer:
                _curve(axes, {scale: list(errors.values()) for scale, errors in by.items()}, row, style(row, rows))
        axes.set(
            xscale="log", yscale="log", title=optimizer, xlabel=f"factor before the loss of {outcome.problem.scaled}"
        )
        axes.grid(alpha=0.3)
    adam.set_ylabel(outcome.problem.error)
    for kind, marker in ((SIMPLEX, "s"), (DECADES, "o")):
        best = {float(n): list(errors.values()) for n, errors in outcome.best_of(kind).items()}
        _curve(budget, best, f"best of n, {kind.partition(', ')[2]}", {"color": "C7", "marker": marker})
    for row in COMPARED:
        errors = table.get((row, "Adam"), {}).get(1.0)
        if errors and all(map(math.isfinite, errors.values())):
            budget.axhline(statistics.mean(errors.values()), linewidth=1, **style(row, rows))
    budget.set(xscale="log", title="random fixed weights", xlabel="sets of weights, each with its learning rate")
    budget.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    budget.grid(alpha=0.3)
    named: dict[str, Any] = {}
    for axes in (adam, budget):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    figure.legend(named.values(), named, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=100)


def _curve(axes: Any, points: Mapping[float, list[float]], label: str, look: Mapping[str, Any]) -> None:  # noqa: ANN401
    finite = {x: errors for x, errors in points.items() if all(map(math.isfinite, errors))}
    if finite:
        means = [statistics.mean(errors) for errors in finite.values()]
        axes.plot(list(finite), means, label=label, **{"marker": ".", **look})
        low, high = ([end(errors) for errors in finite.values()] for end in (min, max))
        axes.fill_between(list(finite), low, high, color=look["color"], alpha=0.08)
