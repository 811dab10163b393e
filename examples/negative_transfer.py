"""Tasks that help and tasks that hurt each other: where learning together fails, and what mends it.

    python examples/negative_transfer.py

Two real digits lie over each other. Four tasks ask which digit is on the left, whether it is odd, and the same of the
right one, from a trunk whose last layer is narrow. The report compares each task with a model of that task alone. With
all four in one model every task loses; two weightings and two groupings try to mend that: two models of two tasks each,
put together as the tasks' affinities say, which were watched while all four trained, or, as a control, the other way.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.monitors import TaskAffinity, best_grouping
from lightning_mtl.transfer import TaskScores, TransferReport, single_task_baselines, train_and_score
from lightning_mtl.weighting import MGDA, UncertaintyWeighting
from multi_digits import DigitPairs, load_splits
from program import next_folder, quieten

CLASSES = {"left": 10, "left_odd": 2, "right": 10, "right_odd": 2}
Loader = DataLoader[tuple[Tensor, dict[str, Tensor]]]


class FourTasks(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Pairs of digits; an item, or a list of them, is ``(image, {task: label})``."""

    def __init__(self, pairs: DigitPairs) -> None:
        self.images = pairs.images
        left, right = pairs.labels.unbind(1)
        self.labels = {"left": left, "left_odd": left % 2, "right": right, "right_odd": right % 2}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index], {task: labels[index] for task, labels in self.labels.items()}

    def loader(self, batch_size: int, *, shuffle: bool = False) -> Loader:
        """Takes a whole batch out of the tensors at once."""
        sampler = RandomSampler(self) if shuffle else SequentialSampler(self)
        return DataLoader(self, sampler=BatchSampler(sampler, batch_size, drop_last=shuffle), batch_size=None)


def data(seed: int) -> tuple[Loader, Loader]:
    """Pairs to train with and pairs, of other scans, to evaluate with."""
    splits = load_splits(seed=seed)
    return FourTasks(splits.train).loader(128, shuffle=True), FourTasks(splits.test).loader(2048)


def model(seed: int) -> MultiTaskModule:
    """A trunk that ends in 16 numbers, too few for all that the four tasks would like to know."""
    accuracies = {
        task: MetricCollection({"accuracy": MulticlassAccuracy(classes, average="micro")})
        for task, classes in CLASSES.items()
    }
    return MultiTaskModule(
        trunk=nn.Sequential(nn.Flatten(), nn.Linear(100, 128), nn.ReLU(), nn.Linear(128, 16), nn.ReLU()),
        heads={task: nn.Linear(16, classes) for task, classes in CLASSES.items()},
        tasks={task: Task(cross_entropy, accuracies[task]) for task in CLASSES},
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-3),
    )


def trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        check_val_every_n_epoch=epochs + 1,  # train_and_score evaluates at the end
        num_sanity_val_steps=0,
        accelerator="cpu",  # faster than a GPU for a model of this size
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def together(seeds: Sequence[int], epochs: int, callback: Callable[[], pl.Callback]) -> list[TaskScores]:
    """All four tasks in one model, with a callback of its own in each Trainer."""
    return [train_and_score(model, data, lambda: trainer(epochs, callback()), seed=seed) for seed in seeds]


def apart(groups: Sequence[Sequence[str]], seeds: Sequence[int], epochs: int) -> list[TaskScores]:
    """A model for each group, their scores put together."""
    scores: list[TaskScores] = [{} for _ in seeds]
    for own, seed in zip(scores, seeds, strict=True):
        for group in groups:
            own.update(train_and_score(model, data, lambda: trainer(epochs), tasks=group, seed=seed))
    return scores


def compare(seeds: Sequence[int], epochs: int, console: Console) -> TransferReport:
    """Train every kind of model with every seed."""
    console.print(f"each task alone: {len(CLASSES)} models for each of {len(seeds)} seeds")
    alone = single_task_baselines(model, data, lambda: trainer(epochs), seeds=seeds)

    console.print("all four tasks in one model: equal weights, watching affinities; two weightings")
    watched: list[TaskAffinity] = []

    def watching() -> TaskAffinity:
        watched.append(TaskAffinity(every_n_steps=10, figure=False))
        return watched[-1]

    runs = {
        "equal weights": together(seeds, epochs, watching),
        "Uncertainty": together(
            seeds, epochs, lambda: UncertaintyWeighting(kinds=dict.fromkeys(CLASSES, "classification"))
        ),
        "MGDA": together(seeds, epochs, lambda: MGDA(at="features")),
    }

    tasks = list(CLASSES)
    affinity = torch.stack([monitor.affinity for monitor in watched]).mean(0)
    groups = [[tasks[position] for position in group] for group in best_grouping(affinity, num_groups=2)]
    names = " | ".join(" + ".join(group) for group in groups)
    console.print(f"affinities group them as {names}; a model for each group")
    runs["by affinity"] = apart(groups, seeds, epochs)
    # The same number of models, the tasks of each put together wrongly: a second trunk alone is worth this much.
    others = [["left", "right"], ["left_odd", "right_odd"]]
    console.print(f"as a control, {' | '.join(' + '.join(group) for group in others)}")
    runs["control"] = apart(others, seeds, epochs)
    return TransferReport(alone, runs)


def verdict(report: TransferReport) -> list[str]:
    """What the report says, in words."""
    hurt = report.hurt("equal weights")
    lines = [f"With equal weights, learning together hurts {', '.join(hurt) or 'no task'} beyond noise."]
    for run in list(report.runs)[1:]:
        change = report.compare(run, "equal weights")
        if not change.beyond_noise:
            says = "makes no difference beyond noise"
        elif change.mean > 0:
            says = "makes it worse"
        elif still := report.hurt(run):
            says = f"mends a part of it; {', '.join(still)} still lose{'s' if len(still) == 1 else ''}"
        else:
            says = "mends it"
        interval = f"{change.mean:+.1f} [{change.low:+.1f}, {change.high:+.1f}]"
        lines.append(f"{run} {says}: Δm changes by {interval} points.")
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tasks that help and tasks that hurt each other, on real digits.")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training pairs; default: 4")
    parser.add_argument("--repeats", type=int, default=3, help="seeds; default: 3")
    parser.add_argument("--logdir", type=Path, default=Path("lightning_logs"), help="default: lightning_logs")
    args = parser.parse_args(argv)
    if args.epochs < 1 or args.repeats < 1:
        parser.error("--epochs and --repeats must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    quieten()
    torch.set_num_threads(1)  # more threads would only wait for each other: the models are small
    console = Console(highlight=False)
    report = compare(range(args.repeats), args.epochs, console)
    console.print("", report.table())
    for line in verdict(report):
        console.print(line, soft_wrap=True)

    name = next_folder(args.logdir, "NegativeTransfer").name
    logger = TensorBoardLogger(args.logdir, name=name, version="report")
    report.log(logger)
    logger.finalize("success")
    folder = Path(logger.log_dir)
    report.figure().savefig(folder / "gains.png", dpi=120)
    report.to_csv(folder / "report.csv")
    console.print(f"\nPicture, CSV and TensorBoard's events (tabs Text and Images) are in {folder}", soft_wrap=True)


if __name__ == "__main__":
    main()
