"""What the example programs share: quiet logs, numbered folders, arguments, intervals, and the way to TensorBoard."""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_mtl.monitors.fit_table import CHARTS, tensorboard_command
from lightning_mtl.paired import t_interval


def quieten() -> None:
    """Leave out what Lightning says about things that are as they should be here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # devices found, tips
    # Lightning 2.6 builds torch's LeafSpec by hand, which torch 2.13 deprecates.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r".*does not have many workers")  # the data are in memory
    warnings.filterwarnings("ignore", r"GPU available but not used")
    warnings.filterwarnings("ignore", r"You defined a `validation_step` but have no")  # the test comes after the fit
    warnings.filterwarnings("ignore", r"The number of training batches .* is smaller than the logging interval")


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def next_folder(logdir: Path, name: str) -> Path:
    """The first of ``name-0``, ``name-1``, ... that no earlier start has taken."""
    return next(folder for n in itertools.count() if not (folder := logdir / f"{name}-{n}").exists())


def progress_display(console: Console) -> Progress:
    """A bar with what is being trained, the share that is done, and the time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, refresh_per_second=4)


class Watcher(pl.Callback):
    """Moves one progress bar on for every epoch of every run."""

    def __init__(self, progress: Progress, epochs: int) -> None:
        self.progress = progress
        self.bar = progress.add_task("", total=epochs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.progress.advance(self.bar)


def spread(values: Sequence[float], form: str = ".1f") -> str:
    """The mean, and the standard deviation of several values."""
    mean = f"{statistics.mean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form.removeprefix('+')}}" if len(values) > 1 else mean


def margin_of(differences: Sequence[float]) -> float:
    """Half the 95 % interval of Student's t for paired differences: few seeds make it wide, as it should be."""
    mean, _, high = t_interval(differences)
    return high - mean


def show_tensorboard(console: Console, folder: Path) -> None:
    """Print the command that opens a folder's curves."""
    console.print(
        f"\nTo see the losses and the weights move:\n\n  {tensorboard_command(str(folder))}\n\n"
        f"then open {CHARTS} in a browser.",
        soft_wrap=True,
    )
