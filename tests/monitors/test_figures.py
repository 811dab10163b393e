"""Heatmaps are drawn once an epoch where TensorBoard shows them, and can be read at any number of tasks."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_mtl.monitors import GradientConflict, TaskAffinity
from lightning_mtl.monitors.figures import heatmap
from tests.small import batches, small
from tests.training import fit, loader


def test_one_figure_an_epoch_of_what_the_epoch_measured(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    monitors = [GradientConflict(2), TaskAffinity(1, exact=True, lr=0.01), GradientConflict(1, figure=False, name="no")]
    for monitor in monitors:
        monitor.most_time = math.inf  # the first figure waits for matplotlib, on a busy machine for long
    fit(small(), loader(*batches(4, 4, 4)), callbacks=monitors, logger=logger, max_epochs=2)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"conflict/heatmap", "affinity/heatmap"}
    assert [image.step for image in events.Images("conflict/heatmap")] == [2, 5]
    assert [scalar.step for scalar in events.Scalars("conflict/fraction")] == [0, 2, 4]
    assert {"affinity/mean", "affinity/lowest", "no/gms"} <= set(tags["scalars"])
    assert all(monitor.epoch.empty for monitor in monitors)


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_small_numbers_are_told_apart_and_gaps_are_no_zeros() -> None:
    values = torch.tensor([[0.0031, -1e-9], [torch.nan, -0.0012]])
    figure = heatmap(values, ["a", "b"], ["a", "b"], title="t", limits=(-0.004, 0.004))
    assert texts(figure) == ["3.10", "0.00", "-1.20"]
    assert figure.axes[1].get_title() == "$10^{-3}$"
    assert figure.axes[0].images[0].get_clim() == pytest.approx((-4, 4))
    assert figure.axes[0].get_facecolor()[:3] == pytest.approx((0.8, 0.8, 0.8))


@pytest.mark.parametrize(("num_tasks", "name"), [(2, "t"), (2, "surface_normals"), (40, "surface_normals")])
def test_nothing_sticks_out(num_tasks: int, name: str) -> None:
    names = [f"{name}_{k}" for k in range(num_tasks)]
    title = "what a step for one task does for another at features, epoch 12"
    figure = heatmap(torch.rand(num_tasks, num_tasks), names, names, title=title, row_label="a step for")
    figure.canvas.draw()
    drawn = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert drawn.x0 > -0.02
    assert drawn.y0 > -0.02
    assert drawn.x1 < width + 0.02
    assert drawn.y1 < height + 0.02
    cell = figure.axes[0].get_window_extent().height / figure.dpi / num_tasks
    assert cell > 0.2  # inches, for names of 9 points


def test_matplotlib_is_asked_for_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for cls in (GradientConflict, TaskAffinity):
        with pytest.raises(ModuleNotFoundError, match=r"figure=True\) draws with matplotlib.*pip install matplotlib\."):
            cls()
        cls(figure=False)
