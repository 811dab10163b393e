"""The picture of a comparison: a mark with its interval for each row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_mtl.monitors.figures import blank_figure, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_mtl.tuning.comparing.result import Comparison

# Ink, faint lines, better, worse, not told apart, and the page, light or dark. Blue and orange are told apart by all.
LIGHT = ("#1f2328", "#d0d7de", "#0969da", "#bc4c00", "#6e7781", "#ffffff")
DARK = ("#e6edf3", "#3d444d", "#58a6ff", "#f0883e", "#9198a1", "#0d1117")


def draw(result: Comparison, *, dark: bool = False, transparent: bool = False) -> Figure:
    """Draw each row's Δm against equal weights with its interval; color shows what holds after the correction.

    Args:
        result: The comparison.
        dark: For a dark page.
        transparent: Leave the background to the page.
    """
    require_matplotlib("Comparison.figure()")
    from matplotlib.patheffects import withStroke

    ink, faint, better, worse, same, page = DARK if dark else LIGHT
    found = {name: one for name, one in result.against_equal.items() if not math.isnan(one.interval.mean)}
    longest = max((len(name) for name in found), default=10)
    figure = blank_figure(5.6 + 0.075 * longest, 1.3 + 0.36 * max(len(found), 1))
    figure.patch.set_alpha(0.0 if transparent else 1.0)
    figure.patch.set_facecolor(page)
    axes: Any = figure.add_subplot()
    axes.set_facecolor("none")
    for place, one in enumerate(found.values()):
        mean, low, high = one.interval
        color = same if not one.significant else better if mean < 0 else worse
        if not math.isnan(low):
            axes.plot([low, high], [place, place], color=color, linewidth=2.2, solid_capstyle="round")
        axes.plot([mean], [place], "o", color=color, markersize=7)
        end = mean if math.isnan(high) else high
        text = axes.annotate(f"{mean:+.1f}", (end, place), (7, 0), textcoords="offset points", va="center", color=color)
        text.set_path_effects([withStroke(linewidth=4, foreground=page)])  # no line crosses a number
    axes.axvline(0, color=ink, linewidth=1, zorder=0)
    axes.set_yticks(range(len(found)), list(found))
    axes.set_ylim(len(found) - 0.4, -0.7)
    axes.grid(axis="x", color=faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink, length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Δm against equal weights, %   (← better)", color=ink)
    return figure
