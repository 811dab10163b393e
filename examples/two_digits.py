"""Learn two tasks at once from real scans: which digit is on the left, which on the right, of two overlaid ones.

    python examples/two_digits.py                      # GradNorm
    python examples/two_digits.py --weighting MGDA     # another method; --help lists them

What to copy is ``TwoDigits``, the model, and ``train``, which gives the weighting to the Trainer. The rest compares:
equal weights and a model for each task alone get the same budget, and a table says what the weighting was worth.
"""

from __future__ import annotations

import argparse
import inspect
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl import weighting as methods
from lightning_mtl.metrics import delta_m
from multi_digits import TASKS, Splits, load_splits
from program import Watcher, margin_of, next_folder, positive, progress_display, quieten, show_tensorboard, spread

# Methods that need, or are better off with, arguments.
ARGUMENTS: dict[str, dict[str, object]] = {
    "CRMOGM": {"weighting": methods.MGDA()},
    "DTP": {"metric": "accuracy"},
    "StaticWeights": {"weights": {"left": 1.5, "right": 0.5}},
    "UncertaintyWeighting": {"kinds": dict.fromkeys(TASKS, "classification")},
}


def is_ready(name: str) -> bool:
    """Whether a method needs no argument beyond those above."""
    try:
        inspect.signature(getattr(methods, name)).bind(**ARGUMENTS.get(name, {}))
    except TypeError:
        return False
    return True


CHOICES = sorted(name for name in methods.__all__ if is_ready(name))


class TwoDigits(MultiTaskModule):
    """A trunk that all tasks share, one head a task, and each task's loss and metrics."""

    def __init__(self, pixels: int, tasks: Sequence[str] = TASKS) -> None:
        accuracy = MetricCollection({"accuracy": MulticlassAccuracy(10, average="micro")})
        super().__init__(
            trunk=nn.Sequential(nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()),
            heads={task: nn.Linear(128, 10) for task in tasks},
            tasks={task: Task(loss=cross_entropy, metrics=accuracy) for task in tasks},
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Run:
    """One model to train: its name in TensorBoard, its tasks, the name of its weighting if it has one."""

    name: str
    tasks: Sequence[str] = TASKS
    method: str | None = None

    def weighting(self) -> list[Weighting]:
        return [getattr(methods, self.method)(**ARGUMENTS.get(self.method, {}))] if self.method else []


@dataclass(frozen=True)
class Score:
    """How a task ended: its accuracy in percent and its loss on the test pairs, and its last weight in training."""

    accuracy: float
    loss: float
    weight: float


Scores = dict[str, Score]


def train(run: Run, splits: Splits, *, seed: int, epochs: int, log_to: Path | None, watcher: pl.Callback) -> Scores:
    """Train and test one model; each task's score."""
    torch.manual_seed(seed)
    model = TwoDigits(splits.train.images[0].numel(), run.tasks)
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
    train_loader = splits.train.only(run.tasks).loader(128, shuffle=True)
    trainer.fit(model, train_loader, splits.val.only(run.tasks).loader(1024))
    weights = {task: float(trainer.callback_metrics.get(f"weight/{task}", torch.nan)) for task in run.tasks}
    (tested,) = trainer.test(model, splits.test.only(run.tasks).loader(1024), verbose=False)
    return {
        task: Score(100 * tested[f"test/accuracy/{task}"], tested[f"test/loss/{task}"], weights[task])
        for task in run.tasks
    }


def train_all(runs: Sequence[Run], args: argparse.Namespace, log_to: Path, console: Console) -> list[dict[str, Scores]]:
    """Train every run with every seed; one dict of scores a seed."""
    results = []
    with progress_display(console) as progress:
        watcher = Watcher(progress, args.repeats * len(runs) * args.epochs)
        for seed in range(args.seed, args.seed + args.repeats):
            splits = load_splits(args.data_dir, seed=seed)
            scores: dict[str, Scores] = {}
            for run in runs:
                progress.update(watcher.bar, description=f"seed {seed}  {run.name}")
                began = time.perf_counter()
                # One seed is enough to look at; the others are there to tell a difference from noise.
                folder = log_to if seed == args.seed else None
                scores[run.name] = train(run, splits, seed=seed, epochs=args.epochs, log_to=folder, watcher=watcher)
                shown = "  ".join(f"{task} {score.accuracy:5.1f} %" for task, score in scores[run.name].items())
                console.print(f"seed {seed}  {run.name:<20} {shown:<30} {time.perf_counter() - began:5.1f} s")
            results.append(scores)
    return results


def report(results: Sequence[dict[str, Scores]], name: str, console: Console) -> None:
    """Print the table, and whether the differences in it mean anything."""
    seeds = "one seed" if len(results) == 1 else f"mean ± standard deviation over {len(results)} seeds"
    table = Table(title=f"Test pairs, {seeds}")
    table.add_column("", no_wrap=True)
    table.add_column("task")
    for column in ("accuracy %", "loss", "final weight", "Δm %"):
        table.add_column(column, justify="right", no_wrap=True)
    single = [{**scores["single-left"], **scores["single-right"]} for scores in results]
    models = {name: [scores[name] for scores in results], "equal weights": [scores["equal"] for scores in results]}
    for label, found in {**models, "single-task": single}.items():
        changes = [
            delta_m([scores[task].accuracy for task in TASKS], [alone[task].accuracy for task in TASKS], [True, True])
            for scores, alone in zip(found, single, strict=True)
        ]
        for task in TASKS:
            first = task == TASKS[0]
            table.add_row(
                label if first else "",
                task,
                spread([scores[task].accuracy for scores in found]),
                f"{statistics.mean(scores[task].loss for scores in found):.3f}",
                "-" if found is single else spread([scores[task].weight for scores in found], ".2f"),
                spread(changes, "+.1f") if first and found is not single else "",
                end_section=not first,
            )
    console.print("", table)
    console.print("Δm: mean change of accuracy from the single-task models; negative is better.")
    console.print(compare(name, models[name], "equal weights", models["equal weights"]), soft_wrap=True)
    console.print(compare(name, models[name], "two single-task models", single), soft_wrap=True)


def compare(name: str, found: Sequence[Scores], other: str, baseline: Sequence[Scores]) -> str:
    """Whether the mean accuracies of two kinds of models, trained with the same seeds, differ beyond noise."""
    differences = [
        statistics.mean(after[task].accuracy - before[task].accuracy for task in TASKS)
        for after, before in zip(found, baseline, strict=True)
    ]
    mean = statistics.mean(differences)
    says = f"{name} against {other}: {round(mean, 1) + 0.0:+.1f} points of accuracy"  # + 0.0 turns -0.0 into 0.0
    if len(differences) < 2:
        return f"{says}; one seed cannot tell that from noise, --repeats 3 can."
    margin = margin_of(differences)
    verdict = "within noise" if abs(mean) <= margin else "beyond noise"
    return f"{says} ± {margin:.1f} (95 % interval over {len(differences)} seeds): {verdict}."


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Left and right digit of two overlaid scans, learned together.")
    folder = os.environ.get("LIGHTNING_MTL_DATA")
    parser.add_argument("--weighting", default="GradNorm", choices=CHOICES, help="default: GradNorm")
    parser.add_argument("--epochs", type=positive, default=6, help="passes over the training pairs; default: 6")
    parser.add_argument("--seed", type=int, default=0, help="the first seed: split, pairs, weights and order")
    parser.add_argument("--repeats", type=positive, help="seeds to repeat it all with; default: 3, for MultiMNIST 1")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(folder) if folder else None,
        help="a folder with the MNIST files, for MultiMNIST; default: $LIGHTNING_MTL_DATA, else scikit-learn's scans",
    )
    parser.add_argument("--logdir", type=Path, default=Path("lightning_logs"), help="default: lightning_logs")
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (1 if args.data_dir else 3)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    quieten()
    torch.set_num_threads(1)  # more threads would only wait for each other: the models are small
    console = Console(highlight=False)
    try:
        splits = load_splits(args.data_dir, seed=args.seed)
    except (OSError, ValueError) as error:
        raise SystemExit(f"two_digits.py: {error}") from error
    name = "MultiMNIST" if args.data_dir else "MultiDigits"
    log_to = next_folder(args.logdir, name)
    sizes = ", ".join(f"{len(getattr(splits, part))} {part}" for part in ("train", "val", "test"))
    console.print(f"{name}: {sizes} pairs; {args.epochs} epochs a model; curves in {log_to}", soft_wrap=True)
    runs = [
        Run(args.weighting, method=args.weighting),
        Run("equal"),
        *(Run(f"single-{task}", tasks=[task]) for task in TASKS),
    ]
    results = train_all(runs, args, log_to, console)
    report(results, args.weighting, console)
    show_tensorboard(console, log_to)


if __name__ == "__main__":
    main()
