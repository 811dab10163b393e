"""Learn what and where at once: which digit lies on a cluttered canvas, and the box around it.

    python examples/detection.py                                   # IMTL-L
    python examples/detection.py --weighting GradNorm --epochs 12  # another method; --help lists them

A classification and a localization, whose losses differ by a factor of twenty, share a convolutional trunk. The chosen
weighting, equal weights and a model for each task alone get the same budget. A table compares accuracy and mean IoU;
predictions drawn on test images go into a PNG and TensorBoard.

What came out with the defaults, three seeds: equal weights neglect the box, whose loss is the smaller one (IoU 62 %,
accuracy 62 %); IMTL-L restores it (77 %) and gives up accuracy for it (52 %); alone the tasks reach 79 % and 58 %. None
is trained to the end within eight epochs.

The box's loss is torch's ``l1_loss``, as DETR has it beside the generalized IoU; where torchvision is installed,
``torchvision.ops.generalized_box_iou_loss`` takes its place in ``Task`` as it is.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, l1_loss
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl import weighting as methods
from lightning_mtl.metrics import delta_m
from lightning_mtl.monitors.figures import blank_figure
from lightning_mtl.monitors.loggers import log_figure, loggers_of, step_of
from program import Watcher, next_folder, positive, quieten, spread
from scattered_digits import TASKS, Scenes, Splits, load_splits

CHOICES: dict[str, Callable[[], Weighting]] = {
    "UncertaintyWeighting": functools.partial(
        methods.UncertaintyWeighting, kinds={"digit": "classification", "box": "regression"}
    ),
    "GradNorm": methods.GradNorm,
    "DWA": methods.DWA,
    "IMTLL": methods.IMTLL,
    "MGDA": methods.MGDA,
    "NashMTL": methods.NashMTL,
}
METRICS = {"digit": "accuracy", "box": "iou"}
SHOWN = 8


class Corners(nn.Module):
    """Features to ``(left, top, right, bottom)``, ``[B, 4]``, by way of center and size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 4)

    def forward(self, features: Tensor) -> Tensor:
        center, size = self.layer(features).sigmoid().split(2, dim=1)
        return torch.cat([center - size / 2, center + size / 2], dim=1)


class MeanIoU(Metric):
    """The mean intersection over union of one predicted and one true box a sample, both ``[B, 4]``."""

    higher_is_better = True
    total: Tensor
    number: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("number", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.total += iou(prediction, target).sum()
        self.number += len(target)

    def compute(self) -> Tensor:
        return self.total / self.number


def iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union of pairs of boxes, ``[B]``."""
    low, high = torch.maximum(one[:, :2], other[:, :2]), torch.minimum(one[:, 2:], other[:, 2:])
    common = (high - low).clamp(min=0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (one, other)]
    return common / (areas[0] + areas[1] - common)


class WhatAndWhere(MultiTaskModule):
    """Three convolutions and a layer that all tasks share, and one layer a task."""

    def __init__(self, canvas: int, tasks: Sequence[str] = TASKS) -> None:
        channels = [1, 16, 32]
        convolutions = [
            layer
            for pair in itertools.pairwise(channels)
            for layer in (nn.Conv2d(*pair, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        ]
        side = canvas // 4  # halved by each pooling
        heads = {"digit": nn.Linear(128, 10), "box": Corners(128)}
        accuracy = MetricCollection({"accuracy": MulticlassAccuracy(10, average="micro")})
        of_task = {"digit": Task(cross_entropy, accuracy), "box": Task(l1_loss, MetricCollection({"iou": MeanIoU()}))}
        super().__init__(
            trunk=nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(channels[-1] * side**2, 128), nn.ReLU()),
            heads={task: heads[task] for task in tasks},
            tasks={task: of_task[task] for task in tasks},
            optimizer=functools.partial(torch.optim.Adam, lr=3e-3),
        )


@dataclass(frozen=True)
class Run:
    """One model to train: its name in TensorBoard, its tasks, the name of its weighting if it has one."""

    name: str
    tasks: Sequence[str] = TASKS
    method: str | None = None


Scores = dict[str, float]  # each task's metric on the test images, in percent


def train(
    run: Run, splits: Splits, *, seed: int, epochs: int, log_to: Path | None, watcher: pl.Callback
) -> tuple[Scores, WhatAndWhere]:
    """Train and test one model; its scores, and itself."""
    torch.manual_seed(seed)
    model = WhatAndWhere(splits.train.images.shape[-1], run.tasks)
    weighting: list[Weighting] = [CHOICES[run.method]()] if run.method else []
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*weighting, watcher],
        logger=TensorBoardLogger(log_to.parent, name=log_to.name, version=run.name) if log_to else False,
        log_every_n_steps=10,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, splits.train.only(run.tasks).loader(64, shuffle=True), splits.val.only(run.tasks).loader(1024))
    (tested,) = trainer.test(model, splits.test.only(run.tasks).loader(1024), verbose=False)
    if log_to and len(run.tasks) == len(TASKS):
        figure = draw({run.name: model}, splits.test)
        log_figure(loggers_of(trainer), "predictions", figure, step_of(trainer))
        for written in trainer.loggers:
            written.finalize("success")  # as Lightning did before there was a picture
    return {task: 100 * tested[f"test/{METRICS[task]}/{task}"] for task in run.tasks}, model


def draw(models: dict[str, WhatAndWhere], scenes: Scenes) -> Figure:
    """Each model's boxes and digits on the same test images, one row a model."""
    figure = blank_figure(1.5 * SHOWN, 1.85 * len(models) + 0.4)
    images, targets = scenes[range(SHOWN)]
    canvas = images.shape[-1]
    for row, (name, model) in enumerate(models.items()):
        with torch.no_grad():
            predictions = model.eval()(images)
        overlaps = iou(predictions["box"], targets["box"])
        for column in range(SHOWN):
            axes = figure.add_subplot(len(models), SHOWN, row * SHOWN + column + 1)
            axes.imshow(images[column, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            for boxes, color in ((targets["box"], "limegreen"), (predictions["box"], "orange")):
                left, top, right, bottom = (canvas * boxes[column] - 0.5).tolist()
                axes.add_patch(
                    Rectangle((left, top), right - left, bottom - top, fill=False, color=color, linewidth=1.8)
                )
            found, true = int(predictions["digit"][column].argmax()), int(targets["digit"][column])
            says = f"{found}" if found == true else f"{found}, not {true}"
            axes.set_title(
                f"{says}   IoU {overlaps[column]:.2f}", fontsize=9, color="black" if found == true else "red"
            )
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(name, fontsize=9)
    figure.suptitle("Test images: true boxes green, predicted ones orange; wrong digits red", fontsize=10)
    return figure


def report(results: Sequence[dict[str, Scores]], name: str, console: Console) -> None:
    """Print the table: multi-task with and without the weighting, and each task alone."""
    seeds = "one seed" if len(results) == 1 else f"mean ± standard deviation over {len(results)} seeds"
    table = Table(title=f"Test images, {seeds}")
    table.add_column("", no_wrap=True)
    for column in ("accuracy %", "mean IoU %", "Δm %"):
        table.add_column(column, justify="right", no_wrap=True)
    single = [{**scores["single-digit"], **scores["single-box"]} for scores in results]
    models = {name: [scores[name] for scores in results], "equal weights": [scores["equal"] for scores in results]}
    for label, found in {**models, "single-task": single}.items():
        changes = [
            delta_m([scores[task] for task in TASKS], [alone[task] for task in TASKS], [True, True])
            for scores, alone in zip(found, single, strict=True)
        ]
        shown = [spread([scores[task] for scores in found]) for task in TASKS]
        table.add_row(label, *shown, "" if found is single else spread(changes, "+.1f"))
    console.print("", table)
    console.print("Δm: mean change from the two single-task models; negative is better.")
    for task, metric in METRICS.items():
        gained = [a[task] - b[task] for a, b in zip(models[name], models["equal weights"], strict=True)]
        signs = f"better with {sum(g > 0 for g in gained)} of {len(gained)} seeds"
        console.print(f"{name} against equal weights, {metric}: {statistics.mean(gained):+.1f} points, {signs}.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classification and localization of a digit on a cluttered canvas.")
    folder = os.environ.get("LIGHTNING_MTL_DATA")
    parser.add_argument("--weighting", default="IMTLL", choices=sorted(CHOICES))
    parser.add_argument("--epochs", type=positive, default=8, help="passes over the training images; default: 8")
    parser.add_argument("--seed", type=int, default=0, help="the first seed: split, canvases, weights and order")
    parser.add_argument("--repeats", type=positive, help="seeds to repeat it all with; default: 3, for MNIST 1")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(folder) if folder else None,
        help="a folder with the MNIST files; default: $LIGHTNING_MTL_DATA, else scikit-learn's scans",
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
        raise SystemExit(f"detection.py: {error}") from error
    log_to = next_folder(args.logdir, "Detection")
    sizes = ", ".join(f"{len(getattr(splits, part))} {part}" for part in ("train", "val", "test"))
    console.print(f"{sizes} images; {args.epochs} epochs a model; curves and pictures in {log_to}", soft_wrap=True)
    runs = [
        Run(args.weighting, method=args.weighting),
        Run("equal"),
        *(Run(f"single-{task}", tasks=[task]) for task in TASKS),
    ]
    results: list[dict[str, Scores]] = []
    with Progress(console=console, transient=True, refresh_per_second=4) as progress:
        watcher = Watcher(progress, args.repeats * len(runs) * args.epochs)
        for seed in range(args.seed, args.seed + args.repeats):
            first = seed == args.seed
            splits = splits if first else load_splits(args.data_dir, seed=seed)
            scores, models = {}, {}
            for run in runs:
                progress.update(watcher.bar, description=f"seed {seed}  {run.name}")
                scores[run.name], models[run.name] = train(
                    run, splits, seed=seed, epochs=args.epochs, log_to=log_to if first else None, watcher=watcher
                )
                shown = "  ".join(f"{METRICS[task]} {score:5.1f} %" for task, score in scores[run.name].items())
                console.print(f"seed {seed}  {run.name:<20} {shown}")
            results.append(scores)
            if first:
                shared = {run.name: models[run.name] for run in runs if len(run.tasks) == len(TASKS)}
                draw(shared, splits.test).savefig(log_to / "predictions.png", dpi=150)
    report(results, args.weighting, console)
    console.print(f"\nPredictions are drawn in {log_to / 'predictions.png'}, and in TensorBoard:", soft_wrap=True)
    console.print(f"\n  tensorboard --logdir {log_to}", soft_wrap=True)


if __name__ == "__main__":
    main()
