"""Draws tables and intervals as figures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_mtl.metrics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_WRITTEN_CELLS = 12 * 12


def require_matplotlib(who: str) -> None:
    """Refuse to draw where matplotlib is missing, at construction rather than at the first epoch's end.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who} draws with matplotlib, which is not installed; run pip install matplotlib."
        ) from error


def blank_figure(width: float, height: float) -> Figure:
    """Make a figure of this size in inches outside of pyplot's global state, so that nothing has to close it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heatmap(
    values: Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    limits: tuple[float, float] | None = None,
    colors: str = "RdBu",
    row_label: str = "",
    column_label: str = "",
) -> Figure:
    """Draw a matrix with names for its rows and columns, and numbers in the cells where they are readable.

    Numbers that two decimals would not tell apart, or that are long, are drawn in a power of ten that the color scale
    names.

    Args:
        values: ``[R, C]``; what is not a number stays gray.
        rows: R names.
        columns: C names.
        title: What the matrix shows.
        limits: The values at the ends of the color scale; None takes the extremes found.
        colors: One of matplotlib's color maps.
        row_label: What a row is.
        column_label: What a column is.

    Example:
        >>> import torch
        >>> figure = heatmap(torch.eye(2), ["a", "b"], ["a", "b"], title="cosine", limits=(-1, 1))
        >>> figure.get_suptitle()
        'cosine'
    """
    table = values.detach().double().cpu().numpy()
    exponent = _exponent(table if limits is None else limits)
    table = table / 10.0**exponent
    # Cells keep about the same size from 2 tasks to 40, and names have room.
    longest = max((len(name) for name in rows), default=1)
    width = 2.6 + 0.09 * longest + 0.42 * max(len(columns), 3)
    lines = textwrap.wrap(title, max(20, int(11 * width)))
    tallest = max((len(name) for name in columns), default=1)
    figure = blank_figure(width, 1.6 + 0.2 * len(lines) + 0.09 * tallest + 0.38 * max(len(rows), 3))
    axes: Any = figure.add_subplot()
    axes.set_facecolor("0.8")  # where there is no number, unlike the middle of the scale
    low, high = (None, None) if limits is None else (limit / 10.0**exponent for limit in limits)
    image = axes.imshow(table, cmap=colors, vmin=low, vmax=high, aspect="auto")
    upright = all(len(name) <= 4 for name in columns)
    axes.set_xticks(range(len(columns)), columns, rotation=0 if upright else 60, ha="center" if upright else "right")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(labelsize=9, length=0)
    figure.suptitle("\n".join(lines), fontsize=11)  # over the whole figure: there is more room than over the axes
    axes.set_xlabel(column_label)
    axes.set_ylabel(row_label)
    scale = figure.colorbar(image, ax=axes, shrink=0.8)
    if exponent:
        scale.ax.set_title(f"$10^{{{exponent}}}$", fontsize=9)
    if table.size <= MOST_WRITTEN_CELLS:
        _write_cells(axes, image, table)
    return figure


def _write_cells(axes: Any, image: Any, table: Any) -> None:  # noqa: ANN401 - matplotlib's and NumPy's objects
    for (row, column), value in _cells(table):
        red, green, blue, _ = image.cmap(image.norm(value))
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        axes.text(
            column,
            row,
            f"{round(value, 2) + 0.0:.2f}",
            ha="center",
            va="center",
            fontsize=8,
            color="black" if bright else "white",
        )


def _exponent(values: Any) -> int:  # noqa: ANN401 - numbers in any arrangement
    """The power of ten to draw in: 0, or the multiple of 3 that leaves one to three digits before the point."""
    import numpy as np

    found = np.abs(np.asarray(values, dtype=float))
    largest = float(found[np.isfinite(found)].max(initial=0.0))
    return 0 if largest == 0 or 0.1 <= largest < 100 else 3 * math.floor(math.log10(largest) / 3)


def _cells(table: Any) -> list[tuple[tuple[int, int], float]]:  # noqa: ANN401
    return [
        ((row, column), float(value))
        for row, line in enumerate(table)
        for column, value in enumerate(line)
        if value == value  # not a number is not equal to itself
    ]


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
        places = [row + offset for row in range(len(rows))]
        axes.errorbar(
            [i.mean for i in own],
            places,
            xerr=_whiskers(own),
            fmt="o",
            markersize=4.5,
            capsize=2.5,
            linewidth=1.3,
            label=name,
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
        axes.errorbar(
            at, [i.mean for i in own], yerr=_whiskers(own), marker="o", markersize=4.5, capsize=2.5, label=name
        )
    axes.set_xscale("log")
    axes.set_xticks(at, [str(size) for size in at])
    axes.minorticks_off()
    axes.set_xlabel(axis)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def draw_bars(kinds: Mapping[str, Sequence[Mapping[str, float]]], rows: Sequence[str], *, title: str) -> Figure:
    """Draw horizontal bars, of parts behind each other, on an axis of its own for each kind of number.

    Args:
        kinds: ``{kind: [the parts of each bar by name]}``.
        rows: What each bar is, from the top.
        title: What the bars show.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    require_matplotlib("draw_bars")
    figure = blank_figure(2 + 2.4 * len(kinds), 1.2 + 0.45 * len(rows))
    shared: Any = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, (kind, bars) in zip(shared, kinds.items(), strict=True):
        for place, parts in enumerate(bars):
            left = 0.0
            for number, value in enumerate(parts.values()):
                axes.barh(place, value, left=left, height=0.6, color=f"C{number % 10}", edgecolor="white")
                left += value
        axes.set_title(kind, fontsize=10)
        axes.locator_params(axis="x", nbins=3)
        axes.set_yticks(range(len(rows)), rows)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    shared[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    return figure


def draw_history(
    values: Mapping[str, Sequence[tuple[int, float]]],
    best_of: Sequence[Callable[[float, float], float]],
    *,
    title: str,
) -> Figure:
    """Draw the values of trials in their order, and the best so far as a line, on an axis for each objective.

    Args:
        values: ``{objective: [(number of the trial, value)]}``.
        best_of: For each objective the better of two values: ``min`` or ``max``.
        title: What was searched.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    require_matplotlib("draw_history")
    figure = blank_figure(6.4, 0.8 + 2.2 * len(values))
    rows: Any = figure.subplots(len(values), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, points), best in zip(rows, values.items(), best_of, strict=True):
        trials = [trial for trial, _ in points]
        found = [value for _, value in points]
        axes.plot(trials, found, "o", markersize=4.5, label="trial")
        axes.plot(trials, list(accumulate(found, best)), drawstyle="steps-post", label="best so far")
        axes.set_ylabel(name)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1].set_xlabel("trial")
    rows[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _whiskers(intervals: Sequence[Interval]) -> list[list[float]]:
    """Lengths below and above the means: 0 where there is no interval, or where rounding would make it negative."""
    ends = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
    return [[0.0 if math.isnan(length) else max(length, 0.0) for length in side] for side in ends]
