"""Stopping each task by itself, keeping its best epoch, and sampling what lags: where it pays, and where not.

    python examples/task_control.py
    python examples/task_control.py --seeds 2 --epochs 20

Two tables that a model learns by heart or does not: 442 diabetes patients with two questions, and scans of digits with
five. Then three tasks with scans of their own, of unlike sizes or unlike difficulty. What to copy is ``callbacks_of``
and ``mixed``; the rest compares, on test data that decided nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

import census
import own_datasets
import scans
from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.control import TaskCheckpoint, TaskEarlyStopping
from lightning_mtl.data import Adaptive, Mixing, MultiTaskDataModule, Proportional, RoundRobin
from program import margin_of, positive, quieten

Loader = DataLoader[tuple[Tensor, dict[str, Tensor]]]
THEN = ("drop", "head_only")
MODES: dict[str, Mixing] = {
    "round robin": RoundRobin(),
    "proportional": Proportional(),
    "adaptive": Adaptive("accuracy"),
}


class Classifier(MultiTaskModule):
    """A trunk for all questions, and a classifier for each."""

    def __init__(self, inputs: int, classes: Mapping[str, int]) -> None:
        super().__init__(
            trunk=nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()),
            heads={task: nn.Linear(64, number) for task, number in classes.items()},
            tasks={
                task: Task(
                    cross_entropy,
                    MetricCollection({"accuracy": MulticlassAccuracy(number, average="micro")}),
                    missing=scans.MISSING,
                )
                for task, number in classes.items()
            },
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def callbacks_of(way: str, folder: Path) -> list[pl.Callback]:
    """What a run is controlled by; ``"all"`` trains all tasks to the end, and keeps what was best on the way."""
    if way == "all":
        return [TaskCheckpoint("loss", dirpath=folder)]
    return [TaskEarlyStopping("loss", patience=5, then=way)]  # type: ignore[arg-type]  # one of THEN


def trainer_of(epochs: int, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",  # faster than a GPU for models of this size
        logger=False,
        enable_checkpointing=any(isinstance(callback, TaskCheckpoint) for callback in callbacks),
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def losses(trainer: pl.Trainer, module: Classifier, test: Loader) -> dict[str, float]:
    """Each task's mean test loss."""
    (tested,) = trainer.test(module, test, verbose=False)
    return {task: tested[f"test/loss/{task}"] for task in module.tasks}


def patients(seed: int) -> tuple[tuple[Loader, Loader, Loader], dict[str, int]]:
    """Diabetes patients: 200 to learn from, 132 to validate on, 110 to be tested on."""
    splits = census.load_splits(seed=seed)
    labels = {task: label.squeeze(1).long() for task, label in splits.train.labels.items()}
    parts = [slice(0, 200), slice(200, None)]
    tables = [census.Table(splits.train.features[p], {t: y[p] for t, y in labels.items()}) for p in parts]
    tables.append(census.Table(splits.test.features, {t: y.squeeze(1).long() for t, y in splits.test.labels.items()}))
    train, val, test = (table.loader(32 if not i else 500, shuffle=not i) for i, table in enumerate(tables))
    return (train, val, test), dict.fromkeys(splits.tasks, 2)


def digits(seed: int) -> tuple[tuple[Loader, Loader, Loader], dict[str, int]]:
    """Scans of digits: 800 to learn from, 300 to validate on, 697 to be tested on; all labels are there."""
    splits = scans.load_splits(seed=seed, labeled=scans.SIZES[0])
    loaders = (splits.train.training_loader(steps=25, batch_size=32), splits.val.loader(), splits.test.loader())
    return loaders, {scans.MAIN: 10, **dict.fromkeys(scans.GROUPS, 2)}


def stopped(data: Any, seed: int, epochs: int) -> dict[str, dict[str, float]]:  # noqa: ANN401 - one of the two above
    """The test losses of a seed, by way."""
    found = {}
    for way in ("all", *THEN):
        torch.manual_seed(seed)
        (train, val, test), classes = data(seed)
        module = Classifier(train.dataset[[0]][0].shape[1], classes)
        with tempfile.TemporaryDirectory() as folder:
            callbacks = callbacks_of(way, Path(folder))
            trainer = trainer_of(epochs, callbacks)
            trainer.fit(module, train, val)
            found[way] = losses(trainer, module, test)
            if isinstance(kept := callbacks[0], TaskCheckpoint):
                own = {}
                for name, path in (("compromise", kept.compromise_path), *((t, kept.best_path(t)) for t in classes)):
                    module.load_state_dict(torch.load(str(path), weights_only=True)["state_dict"])
                    own[name] = losses(trainer, module, test)
                found["compromise"] = own["compromise"]
                found["each best"] = {task: own[task][task] for task in classes}
    return found


def unlike_sizes(seed: int) -> tuple[list[dict[str, TensorDataset]], dict[str, int]]:
    """Scans of each task's own, 1,200, 300 and 60, and the others to validate and to be tested on."""
    train, rest = own_datasets.scans(seed)
    return [train, *halves(rest)], own_datasets.CLASSES


def unlike_questions(seed: int) -> tuple[list[dict[str, TensorDataset]], dict[str, int]]:
    """400 scans of each task's own: which digit, odd or even, and the easy question whether it is a zero."""
    whole, rest = (own["digit"].tensors for own in own_datasets.scans(seed))
    parts = []
    for images, digit in (whole, rest):
        labels = {"digit": digit, "parity": digit % 2, "zero": (digit == 0).long()}
        parts.append({task: TensorDataset(images, label) for task, label in labels.items()})
    taken = {task: slice(place * 400, (place + 1) * 400) for place, task in enumerate(parts[0])}
    train = {task: TensorDataset(*(x[taken[task]] for x in own.tensors)) for task, own in parts[0].items()}
    return [train, *halves(parts[1])], {"digit": 10, "parity": 2, "zero": 2}


def halves(data: Mapping[str, TensorDataset]) -> list[dict[str, TensorDataset]]:
    return [
        {task: TensorDataset(*(x[first::2] for x in own.tensors)) for task, own in data.items()} for first in (0, 1)
    ]


def mixed(mixing: Mixing, data: Any, seed: int, steps: int, epochs: int) -> dict[str, float]:  # noqa: ANN401
    """The test errors, in percent, of a model whose tasks have scans of their own."""
    torch.manual_seed(seed)
    (train, val, test), classes = data(seed)
    module = MultiTaskDataModule(
        train, val, test, mixing=mixing, batch_size=32, steps_per_epoch=steps // epochs, seed=seed
    )
    trainer, model = trainer_of(epochs), Classifier(64, classes)
    trainer.fit(model, datamodule=module)
    (tested,) = trainer.test(model, datamodule=module, verbose=False)
    return {task: 100 * (1 - tested[f"test/accuracy/{task}"]) for task in classes}


def compared(title: str, runs: Sequence[Mapping[str, Mapping[str, float]]], reference: str, form: str) -> Table:
    """Means over the seeds, and the difference of the tasks' mean to a reference: 95 % interval, seed by seed."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    tasks = list(runs[0][reference])
    for column in ("", *tasks, "mean", f"against {reference}"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for way in runs[0]:
        means = [statistics.mean(run[way].values()) for run in runs]
        cells = [f"{statistics.mean(run[way][task] for run in runs):{form}}" for task in tasks]
        gains = [mean - statistics.mean(run[reference].values()) for mean, run in zip(means, runs, strict=True)]
        gain = ""
        if way != reference:
            gain = f"{statistics.mean(gains):+{form}}" + (f" ± {margin_of(gains):{form}}" if len(gains) > 1 else "")
        table.add_row(way, *cells, f"{statistics.mean(means):{form}}", gain)
    return table


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=positive, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=40, help="of the runs that are stopped (%(default)s)")
    arguments = parser.parse_args(given)
    quieten()
    console, began = Console(), time.perf_counter()
    torch.set_num_threads(1)  # models of this size are slower on several
    seeds = range(arguments.seeds)
    for name, data in (("Patients", patients), ("Scans", digits)):
        runs = [stopped(data, seed, arguments.epochs) for seed in track(seeds, name, console=console, transient=True)]
        console.print(compared(f"{name}: test loss, {len(runs)} seeds", runs, "all", ".3f"))
    for name, parts, steps, epochs in (
        ("unlike sizes, 400 batches", unlike_sizes, 400, 20),
        ("unlike questions, 200 batches", unlike_questions, 200, 10),
    ):
        errors = [
            {mode: mixed(mixing, parts, seed, steps, epochs) for mode, mixing in MODES.items()}
            for seed in track(seeds, name, console=console, transient=True)
        ]
        console.print(compared(f"Scans, {name}: test error in percent", errors, "round robin", ".1f"))
    console.print(f"{time.perf_counter() - began:.0f} s. Lower is better everywhere.")


if __name__ == "__main__":
    main()
