"""Means with their intervals, as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lightning_mtl.metrics import Interval
from lightning_mtl.monitors.figures import blank_figure, heatmap, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_MARKS = 60
"""More intervals than this in one picture become a heatmap of their means."""


def draw_intervals(values: Mapping[str, Sequence[Interval]], rows: Sequence[str], *, title: str) -> Figure:
    """Draw a mark with its interval for each name and row, or a heatmap of the means where they are too many.

    Args:
        values: ``{name: [an interval for each row]}``.
        rows: What each row is, from the top.
        title: What the values are, with their unit; 0 is the line that they are compared with.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.

    Example:
        >>> figure = draw_intervals({"equal": [Interval(1.0, 0.5, 1.5)]}, ["age"], title="gain, %")
        >>> figure.axes[0].get_title()
        'gain, %'
    """
    require_matplotlib("draw_intervals")
    if len(values) * len(rows) > MOST_MARKS:
        table = torch.tensor([[interval.mean for interval in own] for own in values.values()], dtype=torch.float64)
        largest = float(table.nan_to_num().abs().max()) or 1.0
        return heatmap(table.T, rows, list(values), title=title, limits=(-largest, largest))
    height = 1.2 + 0.3 * len(values) + len(rows) * max(0.32, 0.16 * len(values))
    figure = blank_figure(6.4, height)
    axes: Any = figure.add_subplot()
    for position, (name, own) in enumerate(values.items()):
        offset = ((position + 0.5) / len(values) - 0.5) * 0.7
        ends = [[_length(i.mean - i.low) for i in own], [_length(i.high - i.mean) for i in own]]
        places = [row + offset for row in range(len(rows))]
        axes.errorbar(
            [i.mean for i in own], places, xerr=ends, fmt="o", markersize=4.5, capsize=2.5, linewidth=1.3, label=name
        )
    axes.axvline(0, color="0.4", linewidth=1, zorder=0)
    for row in range(1, len(rows)):
        axes.axhline(row - 0.5, color="0.9", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(values), 4), frameon=False, fontsize=9)
    return figure


def draw_curves(curves: Mapping[str, Sequence[Interval]], at: Sequence[int], *, title: str, axis: str) -> Figure:
    """Draw one line with intervals for each name over a logarithmic axis of sample sizes.

    Args:
        curves: ``{name: [an interval for each size]}``.
        at: The sizes.
        title: What the values are.
        axis: What the sizes are.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    require_matplotlib("draw_curves")
    figure = blank_figure(5.2, 3.6)
    axes: Any = figure.add_subplot()
    for name, own in curves.items():
        ends = [[_length(i.mean - i.low) for i in own], [_length(i.high - i.mean) for i in own]]
        axes.errorbar(at, [i.mean for i in own], yerr=ends, marker="o", markersize=4.5, capsize=2.5, label=name)
    axes.set_xscale("log")
    axes.set_xticks(at, [str(size) for size in at])
    axes.minorticks_off()
    axes.set_xlabel(axis)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def _length(value: float) -> float:
    """No whisker where there is no interval, and none of rounding's negative ones."""
    return 0.0 if math.isnan(value) else max(value, 0.0)
