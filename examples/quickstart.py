"""Learn six tasks at once from real scans of digits, where the one that matters has only 30 labels.

    python examples/quickstart.py                      # NashMTL
    python examples/quickstart.py --weighting FAMO     # another method; --help lists them

What to copy is ``DigitTasks``, the model, and ``train``, which gives the weighting to the Trainer. The rest compares,
with five seeds and the same number of steps: a model for each task alone; all tasks together with equal weights, where
one of them, a regression, has a loss ten thousand times as large as the others; the same with a weighting method; and
the same with the targets of that regression standardized. Each difference is printed with its 95 % interval.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl import weighting as methods
from program import Watcher, margin_of, next_folder, positive, progress_display, quieten, show_tensorboard
from scans import INK, MAIN, MISSING, TASKS, Splits, load_splits

STEPS_AN_EPOCH = 50


class DigitTasks(MultiTaskModule):
    """A trunk that all tasks share, one head a task, and each task's loss and metric."""

    def __init__(self, tasks: Sequence[str] = TASKS, *, lr: float = 1e-2, standardize: bool = False) -> None:
        declared = {}
        for task in tasks:
            classes = 10 if task == MAIN else 2
            accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=MISSING if task == MAIN else None)
            declared[task] = Task(
                cross_entropy,
                metrics=MetricCollection({"accuracy": accuracy}),
                role="main" if task == MAIN else "auxiliary",
                missing=MISSING if task == MAIN else None,
            )
        if INK in tasks:
            rmse = MetricCollection({"rmse": MeanSquaredError(squared=False)})
            declared[INK] = Task(mse_loss, metrics=rmse, role="auxiliary", standardize=standardize)
        super().__init__(
            trunk=nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()),
            heads={task: nn.Linear(64, {MAIN: 10, INK: 1}.get(task, 2)) for task in tasks},
            tasks=declared,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr),
        )


@dataclass(frozen=True)
class Run:
    """One model to train: its name in TensorBoard, its tasks, its weighting's name, and whether ink is standardized."""

    name: str
    tasks: Sequence[str] = TASKS
    method: str | None = None
    standardize: bool = False
    lr: float = 1e-2  # of 1e-3, 3e-3 and 1e-2 the best on seeds 100 to 103

    def weighting(self) -> list[Weighting]:
        return [getattr(methods, self.method)()] if self.method else []


Errors = dict[str, float]  # of each task, in percent


def train(run: Run, splits: Splits, *, seed: int, epochs: int, log_to: Path | None, watcher: pl.Callback) -> Errors:
    """Train and test one model; the error of each of its tasks."""
    torch.manual_seed(seed)
    model = DigitTasks(run.tasks, lr=run.lr, standardize=run.standardize)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*run.weighting(), watcher],
        logger=TensorBoardLogger(log_to.parent, name=log_to.name, version=run.name) if log_to else False,
        log_every_n_steps=5,
        accelerator="cpu",  # faster than a GPU for a model of this size
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, splits.train.training_loader(STEPS_AN_EPOCH), splits.val.loader())
    (tested,) = trainer.test(model, splits.test.loader(), verbose=False)
    deviation = float(splits.test.targets[INK].std())
    return {
        task: 100 * tested[f"test/rmse/{INK}"] / deviation
        if task == INK
        else 100 - 100 * tested[f"test/accuracy/{task}"]
        for task in run.tasks
    }


ALONE, EQUAL, STANDARDIZED = "alone", "equal weights", "standardized ink"


def runs_for(method: str) -> list[Run]:
    """A model of each task alone, and three of all tasks together."""
    alone = [Run(f"{ALONE}-{task}", tasks=[task], standardize=True, lr=3e-3) for task in TASKS]
    together = [Run("equal-weights"), Run(method, method=method), Run("standardized-ink", standardize=True)]
    return [*together, *alone]


def train_all(method: str, args: argparse.Namespace, log_to: Path, console: Console) -> dict[str, list[Errors]]:
    """Train every run with every seed; the errors of each row of the table, seed by seed."""
    rows: dict[str, list[Errors]] = {ALONE: [], EQUAL: [], method: [], STANDARDIZED: []}
    runs, seeds = runs_for(method), range(args.seed, args.seed + args.repeats)
    with progress_display(console) as progress:
        watcher = Watcher(progress, len(seeds) * len(runs) * args.epochs)
        for seed in seeds:
            splits = load_splits(seed=seed)
            found = {}
            for run in runs:
                progress.update(watcher.bar, description=f"seed {seed}  {run.name}")
                # One seed is enough to look at; the others are there to tell a difference from noise.
                folder = log_to if seed == args.seed else None
                found[run.name] = train(run, splits, seed=seed, epochs=args.epochs, log_to=folder, watcher=watcher)
            rows[ALONE].append({task: found[f"{ALONE}-{task}"][task] for task in TASKS})
            rows[EQUAL].append(found["equal-weights"])
            rows[method].append(found[method])
            rows[STANDARDIZED].append(found["standardized-ink"])
    return rows


def report(rows: dict[str, list[Errors]], method: str, console: Console) -> None:
    """Print the errors, and what can be said about them."""
    seeds = len(rows[ALONE])
    table = Table(title=f"Test error in %, mean over {seeds} seed{'s' * (seeds > 1)}; ink: error over its deviation")
    table.add_column("", no_wrap=True)
    for task in TASKS:
        table.add_column(task, justify="right")
    for name, errors in rows.items():
        table.add_row(name, *(f"{statistics.mean(own[task] for own in errors):.1f}" for task in TASKS))
    console.print("", table)
    if seeds < 2:
        console.print("One seed cannot tell a difference from noise; --repeats 5 can.")
        return
    console.print(f"Points of error, with 95 % intervals over {seeds} seeds; below 0 is better:")
    for name in (EQUAL, method, STANDARDIZED):
        console.print(difference(rows, MAIN, name, ALONE))
    console.print(difference(rows, MAIN, method, STANDARDIZED))
    console.print("And what the other tasks gain or lose:")
    for name in (method, STANDARDIZED):
        for task in TASKS[1:]:
            console.print(difference(rows, task, name, ALONE))


def difference(rows: dict[str, list[Errors]], task: str, name: str, other: str) -> str:
    """One line: a task's error in one row less that in another, and whether that is beyond noise."""
    differences = [one[task] - base[task] for one, base in zip(rows[name], rows[other], strict=True)]
    mean, margin = statistics.mean(differences), margin_of(differences)
    verdict = "within noise" if abs(mean) <= margin else "better" if mean < 0 else "worse"
    return f"  {task:<9} {name + ' less ' + other:<36} {mean:+6.1f} ± {margin:.1f}  {verdict}"


def takes_no_argument(name: str) -> bool:
    """Whether a method can be made by its name alone."""
    try:
        inspect.signature(getattr(methods, name)).bind()
    except TypeError:
        return False
    return True


CHOICES = sorted(name for name in methods.__all__ if takes_no_argument(name))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Six tasks on scans of digits, the main one with 30 labels.")
    parser.add_argument("--weighting", default="NashMTL", choices=CHOICES, help="default: NashMTL")
    parser.add_argument("--epochs", type=positive, default=12, help=f"of {STEPS_AN_EPOCH} steps; default: 12")
    parser.add_argument("--seed", type=int, default=0, help="the first seed: split, weights and order")
    parser.add_argument("--repeats", type=positive, default=5, help="seeds to repeat it all with; default: 5")
    parser.add_argument("--logdir", type=Path, default=Path("lightning_logs"), help="default: lightning_logs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    quieten()
    # It tells of ink's loss in every run with raw units; the table shows what comes of it.
    warnings.filterwarnings("ignore", r"In the first step the loss of task")
    warnings.filterwarnings("ignore", r".* times the median weight of the others")  # of 30 labels that are learned
    torch.set_num_threads(1)  # more threads would only wait for each other: the models are small
    console = Console(highlight=False)
    log_to = next_folder(args.logdir, "Quickstart")
    console.print(
        f"1,797 scans; digit has 30 labels, the other tasks 800; {args.epochs * STEPS_AN_EPOCH} steps a model; "
        f"curves in {log_to}",
        soft_wrap=True,
    )
    report(train_all(args.weighting, args, log_to, console), args.weighting, console)
    show_tensorboard(console, log_to)


if __name__ == "__main__":
    main()
