"""The picture of ``gradnorm_toy.py``: test losses and weights over the steps, for two tasks and for ten."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_mtl.monitors.figures import blank_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.gradnorm_toy import Course

LEARNED = ("UncertaintyWeighting", "GradNorm")


def draw(courses: Sequence[Course], scales: Mapping[int, Sequence[float]]) -> Figure:
    """A line for each K: the sum of L_k / L_k(0), then one seed's weights under each method that learns them."""
    figure = blank_figure(13, 3.6 * len(scales))
    grid = figure.subplots(len(scales), 1 + len(LEARNED), squeeze=False)
    for line, (num_tasks, own) in zip(grid, scales.items(), strict=True):
        found = [course for course in courses if course.num_tasks == num_tasks]
        draw_sums(line[0], found, num_tasks)
        for axes, method in zip(line[1:], LEARNED, strict=True):
            draw_weights(axes, next(course for course in found if course.method == method), own)
    for axes in grid.flat:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    return figure


def draw_sums(axes: Any, courses: Sequence[Course], num_tasks: int) -> None:  # noqa: ANN401 - matplotlib's
    for place, method in enumerate(dict.fromkeys(course.method for course in courses)):
        found = [course for course in courses if course.method == method]
        for course in found:
            axes.plot(course.steps, course.sums, color=f"C{place}", linewidth=0.6, alpha=0.5)
        mean = [statistics.mean(sums) for sums in zip(*(course.sums for course in found), strict=True)]
        axes.plot(found[0].steps, mean, color=f"C{place}", linewidth=2, label=method)
    axes.set_title(f"K = {num_tasks}: Σ L(t) / L(0) on test data (thin: each seed)", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def draw_weights(axes: Any, course: Course, scales: Sequence[float]) -> None:  # noqa: ANN401 - matplotlib's
    import matplotlib as mpl

    colors = mpl.colormaps["viridis"]
    for task, scale in enumerate(scales):
        label = f"σ = {scale:g}" if len(scales) == 2 else f"σ = {scale:.1f}" if task in (0, len(scales) - 1) else None
        color = colors(0.9 * math.log(scale) / math.log(100))
        axes.plot(course.steps, [weights[task] for weights in course.weights], color=color, label=label)
    axes.set_yscale("log")
    axes.set_title(f"K = {course.num_tasks}: weights of {course.method}, one seed", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
