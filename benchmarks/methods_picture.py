"""The picture of ``do_methods_work.py``: every row's Δm and its difference from equal weights, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.methods_report import Row
from benchmarks.real_problems import Problem
from benchmarks.trials import EQUAL, SINGLE
from lightning_mtl.monitors.figures import blank_figure
from lightning_mtl.paired import Difference, t_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(problem: Problem, rows: Sequence[Row], differences: Mapping[str, Difference]) -> Figure:
    figure = blank_figure(11, 0.34 * len(rows) + 1.9)
    change, difference = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(rows):
        own = t_interval(row.delta_m)
        change.plot(row.delta_m, [place] * len(row.delta_m), ".", color="0.6", markersize=5)
        if row.name != SINGLE:
            change.plot([own.low, own.high], [place, place], color="C0", linewidth=1.5)
        change.plot(own.mean, place, "o", color="C0", markersize=5)
        if row.name in differences:
            found = differences[row.name]
            color = "C7" if not found.significant else "C2" if found.interval.mean < 0 else "C3"
            difference.plot([found.interval.low, found.interval.high], [place, place], color=color, linewidth=1.5)
            difference.plot(found.interval.mean, place, "o", color=color, markersize=5)
    for axes in (change, difference):
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.grid(axis="x", alpha=0.3)
    equal = next(place for place, row in enumerate(rows) if row.name == EQUAL)
    change.axvline(t_interval(rows[equal].delta_m).mean, color="C0", linewidth=0.8, linestyle=":")
    change.set_yticks(range(len(rows)), [row.name for row in rows])
    change.invert_yaxis()
    change.set_xlabel("Δm, %: left of 0 is better than single-task models\n(gray: each seed; dotted: equal weights)")
    difference.set_xlabel(
        "Δm less that of equal weights, points: left of 0 is better\n"
        "(green, red: significant after Holm's correction; gray: not)"
    )
    figure.suptitle(
        f"{problem.name}, {problem.metric} on test data, {len(rows[0].scores)} seeds: means and 95 % intervals",
        fontsize=11,
    )
    return figure
