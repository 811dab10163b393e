"""What ``against_torchjd.py`` keeps: the cells of several runs in one file, and their picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.store import measured
from lightning_mtl.monitors.figures import blank_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = {
    "ours": ("C0", "o-"),
    "TorchJD": ("C3", "s--"),
    "TorchJD one by one": ("C1", "^--"),
    "TorchJD engine": ("C2", "v--"),
    "plain": ("0.5", "."),
}
RATIOS = {"ours_over_faster": ("over its fastest setting", "C1"), "ours_over_default": ("over its default", "C3")}


def add(path: Path, about: Mapping[str, Any], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the cells beside those that the file has from the same machine and versions; return them all."""
    cells = {result["cell"]: result for result in [*measured(path, about), *results]}
    path.write_text(json.dumps({**about, "results": list(cells.values())}, indent=2) + "\n")
    return list(cells.values())


def draw(results: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw MGDA's steps in milliseconds for each trunk and batch, and below them all methods at K = 8 as ratios."""
    cells = [(result["cell"].split(), result) for result in results]
    trunks = list(dict.fromkeys(words[0] for words, _ in cells))
    batches = sorted({words[2] for words, _ in cells}, key=lambda batch: int(batch[2:]))
    figure = blank_figure(4.4 * len(trunks), 3.1 * (len(batches) + 1))
    grid = figure.subplots(len(batches) + 1, len(trunks), squeeze=False)
    for column, trunk in enumerate(trunks):
        for row, batch in enumerate(batches):
            found = [
                (int(words[1][2:]), result["step_ms"])
                for words, result in cells
                if (words[0], words[2], words[3]) == (trunk, batch, "MGDA")
            ]
            _steps(grid[row][column], found)
            grid[row][column].set_title(f"{trunk}, batch {batch[2:]}, MGDA", fontsize=9)
        at_eight = {words[3]: result for words, result in cells if words[:3] == [trunk, "K=8", batches[0]]}
        _ratios(grid[-1][column], {name: found for name, found in at_eight.items() if "faster" in found["met"]})
        grid[-1][column].set_title(f"{trunk}, batch {batches[0][2:]}, K = 8", fontsize=9)
    for row in grid[:-1]:
        row[0].set_ylabel("ms a step")
    grid[0][0].legend(fontsize=7)
    grid[-1][0].set_ylabel("our step, as a ratio")
    grid[-1][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


def _steps(axes: Axes, found: Sequence[tuple[int, Mapping[str, float]]]) -> None:
    in_order = sorted(found, key=lambda pair: pair[0])
    for name, (color, style) in LINES.items():
        points = [(k, steps[name]) for k, steps in in_order if name in steps]
        axes.plot([k for k, _ in points], [ms for _, ms in points], style, color=color, label=name, markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="K")
    axes.set_xticks([k for k, _ in in_order], [str(k) for k, _ in in_order])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _ratios(axes: Axes, found: Mapping[str, Mapping[str, Any]]) -> None:
    for number, (key, (label, color)) in enumerate(RATIOS.items()):
        places = [place + 0.3 * (number - 0.5) for place in range(len(found))]
        middles = [result[key]["median"] for result in found.values()]
        axes.plot(places, middles, "o", color=color, label=label, markersize=5)
        for place, result in zip(places, found.values(), strict=True):
            axes.plot([place, place], result[key]["quartiles"], color=color, linewidth=1.5)
    axes.axhline(1, color="0.3", linewidth=0.8)
    axes.set_xticks(range(len(found)), list(found), rotation=45, ha="right", fontsize=8)
    axes.set_ylim(0, None)
    axes.grid(axis="y", alpha=0.3)
