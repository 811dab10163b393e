"""Ends a fit with one table, a row for each task, and with the line that opens TensorBoard."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_mtl.method.arguments import GivenArguments
from lightning_mtl.monitors.figures import draw_bars
from lightning_mtl.monitors.report import Report, Shown
from lightning_mtl.monitors.tables import Grid
from lightning_mtl.task.module import TaskModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = ("train loss", "val loss")


class FitReport(Report):
    """Shows what each task came to in a fit: losses, metrics, weight.

    Args:
        tasks: The tasks.
        logged: The newest values by name, as ``trainer.callback_metrics``.
        title: What was trained.

    Example:
        >>> logged = {"loss_epoch/age": 0.5, "val/loss/age": 0.75, "val/accuracy/age": 0.9}
        >>> print(FitReport(["age"], logged).markdown())
        | task | train loss | val loss | val accuracy |
        | ---- | ---------: | -------: | -----------: |
        | age  |        0.5 |     0.75 |          0.9 |
    """

    def __init__(self, tasks: Sequence[str], logged: Mapping[str, float], title: str = "") -> None:
        self.title = title
        self.tasks = list(tasks)
        stage = "val" if any(name.startswith("val/") for name in logged) else "train"
        columns = {"train loss": "loss_epoch", "val loss": "val/loss"}
        for name in logged:
            key, _, task = name.rpartition("/")
            if task in self.tasks and key.startswith(f"{stage}/") and key != "val/loss":
                columns[key.replace("/", " ", 1)] = key
        columns["weight"] = "weight"
        found = {title: [logged.get(f"{key}/{task}") for task in self.tasks] for title, key in columns.items()}
        self.values = {title: own for title, own in found.items() if any(value is not None for value in own)}
        self.delta_m = logged.get("val/delta_m")

    def shown(self) -> Shown:
        """Return the table; the change against single-task baselines stands below it."""
        grid = Grid(["task", *self.values])
        for place, task in enumerate(self.tasks):
            own = [values[place] for values in self.values.values()]
            grid.add(task, *("–" if value is None else f"{value:.4g}" for value in own))
        caption = "" if self.delta_m is None else f"Δm against the single-task baselines: {self.delta_m:+.1f} %"
        return Shown(grid, self.title, caption)

    def records(self) -> tuple[Sequence[str], list[tuple[str | float | None, ...]]]:
        """Return a row for each task, None where nothing was logged."""
        rows = zip(self.tasks, *self.values.values(), strict=True)
        return ("task", *self.values), [tuple(row) for row in rows]

    def figure(self) -> Figure:
        """Draw each column as bars.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        bars = {title: [{title: value or 0.0} for value in own] for title, own in self.values.items()}
        return draw_bars(bars, self.tasks, title=self.title)


class FitTable(GivenArguments, Callback):
    """Prints, after a fit, what each task came to, and the line that opens TensorBoard; on rank 0 only.

    A :class:`~lightning_mtl.MultiTaskModule` brings it along where the Trainer shows progress bars and has none of its
    own, so that ``Trainer(enable_progress_bar=False)`` and ``Trainer(callbacks=[FitTable(show=False)])`` are two ways
    to switch it off. The losses are means over the last epoch, the metrics those of the last validation, or of the
    training where there was none; the weight is that of the last step.

    Args:
        show: Whether to print.

    Example:
        >>> FitTable(show=False)
        FitTable(show=False)
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Print the table, now that the progress bar is gone."""
        if not (self.show and stage == "fit" and trainer.is_global_zero and isinstance(pl_module, TaskModule)):
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        title = f"After {_number(trainer.current_epoch, 'epoch')}, {_number(trainer.global_step, 'step')}"
        shown = FitReport(list(pl_module.tasks), logged, title).shown()
        lines = ["", shown.title, "", shown.grid.text(), *(["", shown.caption] if shown.caption else [])]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                lines += ["", f"{tensorboard_command(logger.log_dir)}   (charts: {CHARTS})"]
        sys.stdout.write("\n".join(lines) + "\n")


CHARTS = "http://localhost:6006/#custom_scalars"


def bring_fit_table(trainer: pl.Trainer) -> list[FitTable]:
    """Return the table for a Trainer that has none, and shows how its training goes on."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    has_one = any(isinstance(callback, FitTable) for callback in callbacks)
    return [] if has_one or trainer.progress_bar_callback is None else [FitTable()]


def tensorboard_command(folder: str) -> str:
    """Return the command that opens TensorBoard on a folder, also where the virtual environment is not activated."""
    beside = Path(sys.executable).with_name("tensorboard")
    found = "tensorboard" if shutil.which("tensorboard") or not beside.exists() else _near(str(beside))
    return f"{shlex.quote(found)} --logdir {shlex.quote(_near(folder))}"


def _near(path: str) -> str:
    """A path from where the user is, if it lies there."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
