"""Three tasks, each with scans of its own and far from as many: how should their batches be mixed?

    python examples/own_datasets.py
    python examples/own_datasets.py --seeds 3 --batches 300

1,200 scans are labeled with their digit, 300 others with its parity, 60 others with whether it is at least 5.
What to copy is ``data_module``. The rest trains a model with each way of mixing on as many batches, and compares.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning.pytorch as pl
import matplotlib as mpl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.data import Joint, Mixing, MultiTaskDataModule, Proportional, RoundRobin, Schedule
from program import next_folder, quieten

SAMPLES = {"digit": 1200, "parity": 300, "large": 60}
CLASSES = {"digit": 10, "parity": 2, "large": 2}
BATCH = 32
SHOWN = 60  # steps of the picture's strips
COLORS = {"digit": "#4477aa", "parity": "#ee6677", "large": "#228833"}

MODES: dict[str, Mixing] = {
    "joint": Joint(),
    "round robin": RoundRobin(),
    "proportional": Proportional(),
    "temperature 3": Proportional(temperature=3),
    "annealed 1 to 5": Schedule(lambda epoch: Proportional(temperature=1 + epoch)),
}
EPOCHS = 5


class Digits(MultiTaskModule):
    """A trunk for all scans, and a classifier for each question."""

    def __init__(self) -> None:
        super().__init__(
            trunk=nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()),
            heads={task: nn.Linear(64, classes) for task, classes in CLASSES.items()},
            tasks={
                task: Task(cross_entropy, MetricCollection({"accuracy": MulticlassAccuracy(classes, average="micro")}))
                for task, classes in CLASSES.items()
            },
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def scans(seed: int) -> tuple[dict[str, TensorDataset], dict[str, TensorDataset]]:
    """Each task's training scans, and the test scans with the labels of all tasks; a scan is in one of them alone."""
    bundled = load_digits()
    images = torch.as_tensor(bundled.data / 16, dtype=torch.float32)
    digit = torch.as_tensor(bundled.target, dtype=torch.int64)
    labels = {"digit": digit, "parity": digit % 2, "large": (digit >= 5).long()}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    *parts, test = order.split([*SAMPLES.values(), len(images) - sum(SAMPLES.values())])
    train = {task: TensorDataset(images[part], labels[task][part]) for task, part in zip(SAMPLES, parts, strict=True)}
    return train, {task: TensorDataset(images[test], labels[task][test]) for task in SAMPLES}


def data_module(mixing: Mixing, batches: int, seed: int) -> MultiTaskDataModule:
    """The data of a run: as many batches in every mode, whether a step takes one of them or one of each task."""
    train, test = scans(seed)
    a_step = len(SAMPLES) if isinstance(mixing, Joint) else 1
    steps = max(1, batches // (EPOCHS * a_step))
    return MultiTaskDataModule(
        train, test=test, mixing=mixing, batch_size=BATCH, steps_per_epoch=steps, seed=seed, drop_last=True
    )


@dataclass
class Count(pl.Callback):
    """Counts each task's batches, and remembers who took the first steps."""

    batches: Counter[str] = field(default_factory=Counter)
    first: list[tuple[str, ...]] = field(default_factory=list)
    steps: int = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Mapping[str, object], *_: object
    ) -> None:
        self.batches.update(batch.keys())
        self.first = [*self.first, tuple(batch)][:SHOWN]
        self.steps += 1


@dataclass(frozen=True)
class Outcome:
    """What became of one run: accuracies in percent, and what was seen."""

    accuracy: dict[str, float]
    seen: Count


def train(mixing: Mixing, batches: int, seed: int, logger: TensorBoardLogger | None) -> Outcome:
    torch.manual_seed(seed)
    model, data, count = Digits(), data_module(mixing, batches, seed), Count()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[count],
        logger=logger or False,
        log_every_n_steps=10,
        accelerator="cpu",  # faster than a GPU for a model of this size
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    (tested,) = trainer.test(model, datamodule=data, verbose=False)
    return Outcome({task: 100 * tested[f"test/accuracy/{task}"] for task in SAMPLES}, count)


def spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def table_of(results: dict[str, list[Outcome]]) -> Table:
    seeds = len(next(iter(results.values())))
    test = len(scans(0)[1]["digit"])
    title = f"Accuracy in percent on {test} test scans, mean ± standard deviation over {seeds} seeds"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("mixing", "steps", "passes", *SAMPLES, "mean"):
        table.add_column(heading, justify="left" if heading == "mixing" else "right", no_wrap=True)
    for name, outcomes in results.items():
        passes = (f"{outcomes[0].seen.batches[task] // (size // BATCH)}" for task, size in SAMPLES.items())
        own = [spread([outcome.accuracy[task] for outcome in outcomes]) for task in SAMPLES]
        mean = statistics.mean(value for outcome in outcomes for value in outcome.accuracy.values())
        table.add_row(name, str(outcomes[0].seen.steps), "/".join(passes), *own, f"{mean:.1f}")
    return table


def picture(results: dict[str, list[Outcome]]) -> Figure:
    """Who takes the first steps, and what came of it."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    strips, bars = figure.subplots(1, 2, width_ratios=[1, 1.15])
    width = 0.8 / len(SAMPLES)
    for row, outcomes in enumerate(results.values()):
        for step, tasks in enumerate(outcomes[0].seen.first):
            height = 0.8 / len(tasks)
            for place, task in enumerate(tasks):
                strips.barh(row - 0.4 + height * (place + 0.5), 1, height, left=step, color=COLORS[task])
        for place, task in enumerate(SAMPLES):
            values = [outcome.accuracy[task] for outcome in outcomes]
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            label = f"{task}, {SAMPLES[task]} scans" if row == 0 else None
            bars.bar(
                row + width * (place - 1),
                statistics.mean(values),
                width,
                yerr=deviation,
                color=COLORS[task],
                label=label,
            )
    strips.set_yticks(range(len(results)), list(results))
    strips.invert_yaxis()
    strips.set(xlabel="step", title=f"Tasks of the first {SHOWN} steps", xlim=(0, SHOWN))
    bars.set_xticks(range(len(results)), [name.replace(" ", "\n", 1) for name in results])
    lowest = min(value for outcomes in results.values() for outcome in outcomes for value in outcome.accuracy.values())
    bars.set(ylabel="test accuracy, %", title="After as many batches in every mode", ylim=(max(0, lowest - 5), 100))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=600, help="training batches of each run; default: 600")
    parser.add_argument("--seeds", type=int, default=5, help="splits and initializations; default: 5")
    parser.add_argument("--logdir", type=Path, default=Path("lightning_logs"), help="default: lightning_logs")
    options = parser.parse_args(argv)
    if options.batches < EPOCHS * len(SAMPLES) or options.seeds < 1:
        parser.error(f"--batches must be at least {EPOCHS * len(SAMPLES)}, --seeds at least 1")
    quieten()
    mpl.use("agg")
    torch.set_num_threads(1)  # the model is too small to share
    console, began = Console(highlight=False), time.perf_counter()
    folder = next_folder(options.logdir, "OwnDatasets")
    results: dict[str, list[Outcome]] = {name: [] for name in MODES}
    runs = list(itertools.product(range(options.seeds), MODES.items()))
    for seed, (name, mixing) in track(runs, description="training", console=console, transient=True):
        # One seed is enough to look at.
        version = name.replace(" ", "-")
        logger = TensorBoardLogger(options.logdir, name=folder.name, version=version) if seed == 0 else None
        results[name].append(train(mixing, options.batches, seed, logger))
    console.print(table_of(results))
    console.print(f"passes: over the {', '.join(f'{size} scans of {task}' for task, size in SAMPLES.items())}")
    figure = picture(results)
    figure.savefig(folder / "own_datasets.png", dpi=120)
    comparison = TensorBoardLogger(options.logdir, name=folder.name, version="comparison")
    comparison.experiment.add_figure("mixing", figure)
    comparison.finalize("success")
    console.print(
        f"\n{time.perf_counter() - began:.0f} s. The picture: {folder / 'own_datasets.png'}, in TensorBoard too:\n\n"
        f"  tensorboard --logdir {folder}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
