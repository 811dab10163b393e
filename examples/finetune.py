"""Learn two tasks from 30 labeled scans of a new scanner: what is a pretrained trunk worth, and how to thaw it?

    python examples/finetune.py

A model learns which digit a scan shows, from 900 scans. Then it gets two tasks more, on scans that are out of focus:
whether the digit is odd, and whether it is 5 or more, with 30 labeled scans for both. Compared are a trunk from
scratch, the pretrained one frozen, trained at once, and thawed layer by layer, over five seeds; and what each forgets
of the first task. What to copy is ``finetuned``. Ends with a table and a picture.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.utils.data import DataLoader, StackDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.finetuning import GradualUnfreezing, add_task
from lightning_mtl.metrics import paired_bootstrap_interval
from lightning_mtl.monitors.figures import blank_figure
from program import quieten, spread

CLASSES = {"digit": 10, "odd": 2, "upper": 2}
NEW = ("odd", "upper")
MANY, LABELED, BATCH = 900, 30, 15
SCRATCH, FROZEN, AT_ONCE, GRADUAL = "from scratch", "frozen trunk", "thawed at once", "thawed step by step"
WAYS = (SCRATCH, FROZEN, AT_ONCE, GRADUAL)

Scans = tuple[Tensor, dict[str, Tensor]]
Scores = dict[str, float]


def task(name: str) -> Task:
    return Task(cross_entropy, MulticlassAccuracy(CLASSES[name], average="micro"))


def model(names: Sequence[str]) -> MultiTaskModule:
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]
    return MultiTaskModule(
        trunk=nn.Sequential(nn.Flatten(), *layers),
        heads={name: nn.Linear(32, CLASSES[name]) for name in names},
        tasks={name: task(name) for name in names},
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
    )


def finetuned(way: str, pretrained: MultiTaskModule, few: Scans, epochs: int) -> MultiTaskModule:
    """The pretrained model with two tasks more, trained on a few scans in one of the ways."""
    grown = model(NEW) if way == SCRATCH else copy.deepcopy(pretrained)
    callbacks: list[pl.Callback] = []
    if way != SCRATCH:
        for name in NEW:
            add_task(grown, name, nn.Linear(32, CLASSES[name]), task(name))
    if way == FROZEN:
        grown.trunk.requires_grad_(False)
    if way == GRADUAL:
        callbacks.append(GradualUnfreezing(every_n_epochs=max(1, epochs // 4), lr_decay=0.4))
    train(grown, few, epochs, BATCH, callbacks)
    return grown


def train(
    module: MultiTaskModule, scans: Scans, epochs: int, batch_size: int, callbacks: Sequence[pl.Callback] = ()
) -> None:
    trainer = quiet(max_epochs=epochs, callbacks=list(callbacks))
    trainer.fit(module, loader(scans, batch_size, shuffle=True))


def accuracies(module: MultiTaskModule, scans: dict[str, Scans]) -> Scores:
    """Each task's accuracy in percent; none for a task that the model never had."""
    found: Scores = {}
    for kind, (inputs, targets) in scans.items():
        known = {name: target for name, target in targets.items() if name in module.tasks}
        if known:
            scores = quiet().test(module, loader((inputs, known), 1000), verbose=False)[0]
            found |= {name: 100 * scores[f"test/MulticlassAccuracy/{name}"] for name in known}
        else:
            found[kind] = math.nan
    return found


def quiet(**arguments: object) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,  # type: ignore[arg-type]
    )


def loader(scans: Scans, batch_size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, dict[str, Tensor]]]:
    inputs, targets = scans
    joint = StackDataset(inputs, StackDataset(**{name: list(target) for name, target in targets.items()}))  # type: ignore[arg-type]
    return DataLoader(joint, batch_size, shuffle=shuffle)


def load(seed: int) -> tuple[Scans, Scans, dict[str, Scans]]:
    """Sharp scans to pretrain on, a few blurred ones to fine-tune on, and the others, sharp and blurred, for tests."""
    bundled = load_digits()
    images = torch.tensor(bundled.images, dtype=torch.float32) / 16
    digits = torch.tensor(bundled.target)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    images, digits = images[order], digits[order]
    sharp: Scans = (images, {"digit": digits})
    blurred: Scans = (avg_pool2d(images, 3, 1, 1), {"odd": digits % 2, "upper": (digits >= 5).long()})
    taught = MANY + LABELED
    held_out = {"digit": part(sharp, taught), "new": part(blurred, taught)}
    return part(sharp, 0, MANY), part(blurred, MANY, taught), held_out


def part(scans: Scans, begin: int, end: int | None = None) -> Scans:
    return scans[0][begin:end], {name: target[begin:end] for name, target in scans[1].items()}


def table(results: dict[str, list[Scores]]) -> Table:
    seeds = len(results[SCRATCH])
    found = Table(title=f"Accuracy on test scans in percent, mean ± standard deviation over {seeds} seeds")
    for column in ("trunk", "odd", "5 or more", "which digit, afterwards"):
        found.add_column(column, justify="left" if column == "trunk" else "right")
    for way, scores in results.items():
        columns = [[score[name] for score in scores] for name in (*NEW, "digit")]
        found.add_row(way, *("-" if any(map(math.isnan, column)) else spread(column) for column in columns))
    return found


def verdict(results: dict[str, list[Scores]], other: str) -> str:
    ours, theirs = ([statistics.mean(s[name] for name in NEW) for s in results[way]] for way in (GRADUAL, other))
    gain = statistics.mean(ours) - statistics.mean(theirs)
    if len(ours) < 2:
        return f"{GRADUAL} against {other}: {gain:+.1f} points; one seed says nothing of noise."
    found = paired_bootstrap_interval(ours, theirs)
    beyond = "within noise" if found.low <= 0 <= found.high else "beyond noise"
    return f"{GRADUAL} against {other}: {gain:+.1f} points [{found.low:+.1f}, {found.high:+.1f}], 95 %: {beyond}."


def draw(results: dict[str, list[Scores]], path: Path) -> None:
    figure = blank_figure(7.5, 4.0)
    axes = figure.add_subplot()
    labels = {"odd": "odd", "upper": "5 or more", "digit": "which digit (sharp scans), not trained on any more"}
    for place, (name, label) in enumerate(labels.items()):
        columns = [[score[name] for score in results[way]] for way in WAYS]
        at = [index + 0.27 * (place - 1) for index in range(len(WAYS))]
        axes.bar(at, [statistics.mean(column) for column in columns], 0.25, label=label, alpha=0.6)
        for x, column in zip(at, columns, strict=True):
            axes.plot([x] * len(column), column, ".", color="black", markersize=4)
    axes.set_xticks(range(len(WAYS)), WAYS)
    axes.set_ylim(40, 100)
    axes.set_ylabel("accuracy on test scans, %")
    axes.set_title(f"Two new tasks from {LABELED} labeled scans of a new scanner; a dot is a seed")
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    figure.savefig(path, dpi=130)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="seeds, each with a split of its own")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of fine-tuning, two steps each")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--picture", type=Path, default=Path("finetune.png"), help="where to draw")
    args = parser.parse_args(arguments)
    if args.repeats < 1 or args.epochs < 1:
        parser.error("--repeats and --epochs must be at least 1.")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args, console = parse(arguments), Console()
    quieten()
    results: dict[str, list[Scores]] = {way: [] for way in WAYS}
    seeds = range(args.seed, args.seed + args.repeats)
    for seed in track(seeds, description="training", console=console, transient=True):
        many, few, held_out = load(seed)
        torch.manual_seed(seed)
        pretrained = model(["digit"])
        train(pretrained, many, 10, 32)
        for way in WAYS:
            torch.manual_seed(seed)
            results[way].append(accuracies(finetuned(way, pretrained, few, args.epochs), held_out))
    console.print(table(results))
    for way in WAYS[:-1]:
        console.print(verdict(results, way), highlight=False)
    draw(results, args.picture)
    console.print(f"All seeds: {args.picture}", highlight=False)


if __name__ == "__main__":
    main()
