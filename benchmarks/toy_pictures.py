"""The pictures of ``toy_pareto.py``: the ways that methods take to the Pareto front, or do not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.toy_problem import front_x2, toy_losses

if TYPE_CHECKING:
    from benchmarks.toy_pareto import Run

SHEET_COLUMNS = 6


def plot(runs: dict[str, dict[tuple[float, float], Run]], folder: Path) -> None:
    """Draw each method's picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in runs.items():
        figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
        draw(axes, name, found)
        axes.set(xlabel="x1", ylabel="x2")
        axes.legend(loc="upper left")
        file_name = "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")
        figure.savefig(folder / f"{file_name}.png", dpi=120)
        plt.close(figure)


def plot_sheet(runs: dict[str, dict[tuple[float, float], Run]], path: Path) -> None:
    """Draw all methods on one sheet."""
    columns = min(SHEET_COLUMNS, len(runs))
    lines = math.ceil(len(runs) / columns)
    size = (1.9 * columns, 2.0 * lines)
    sheet, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, found) in zip(grid.flat, runs.items(), strict=False):
        draw(axes, name, found)
    sheet.savefig(path, dpi=90)
    plt.close(sheet)


def draw(axes: Any, name: str, runs: dict[tuple[float, float], Run]) -> None:  # noqa: ANN401 - matplotlib's
    """The contours of L1 + L2, the way from each start (a dot) to its end (a star), and the front."""
    axis = torch.linspace(-11, 11, 221, dtype=torch.float64)
    x1, x2 = torch.meshgrid(axis, axis, indexing="xy")
    total = sum(toy_losses(torch.stack([x1, x2], dim=-1)), torch.zeros(()))
    axes.contour(x1.numpy(), x2.numpy(), total.numpy(), levels=30, linewidths=0.5, cmap="viridis")
    front = torch.linspace(-7, 7, 57).tolist()
    axes.plot(front, [front_x2(x) for x in front], color="0.5", linewidth=4, label="Pareto front")
    for start, run in runs.items():
        axes.plot([x for x, _ in run.path], [y for _, y in run.path], linewidth=1.2)
        axes.plot(*start, "ko", markersize=4)
        axes.plot(*run.x, "r*", markersize=8)
    axes.set(xlim=(-11, 11), ylim=(-11, 11))
    axes.set_title(name, fontsize=9)
