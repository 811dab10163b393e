"""Read digits of two scanners, one sharp and one out of focus, from 50 labeled scans each: what is worth sharing?

    python examples/soft_sharing.py

Each task is to say which digit a scan shows; the scans are real, scikit-learn's, and those of the second task are
blurred. Compared are a network for each task, soft sharing at several strengths, and one network for both, over five
seeds. What to copy is ``model``. Ends with a table, a picture, and what each way costs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.architectures import SoftSharing, parameter_report
from lightning_mtl.monitors.figures import blank_figure
from program import margin_of, quieten, spread

TASKS = ("sharp", "blurred")
LABELED, HELD_OUT = 50, 200  # scans of each task to train on, and of all to choose the strength with
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
SINGLE, HARD = "single-task", "hard sharing"
WAYS = (SINGLE, *(f"soft sharing, {strength:g}" for strength in STRENGTHS), HARD)

Scans = tuple[Tensor, Tensor]
Scores = dict[str, float]


def model(way: str) -> MultiTaskModule:
    """One of the ways: backbones that know nothing of each other, that are kept close, or one for both tasks."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    strength = 0.0 if way in (SINGLE, HARD) else float(way.split(", ")[1])
    return MultiTaskModule(
        trunk=backbone if way == HARD else SoftSharing(backbone, TASKS, strength=strength),
        heads={task: nn.Linear(32, 10) for task in TASKS},
        tasks={task: Task(cross_entropy, MulticlassAccuracy(10, average="micro")) for task in TASKS},
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    )


def load(seed: int) -> dict[str, dict[str, Scans]]:
    """``{part: {task: (images, labels)}}``; no scan is in two parts, and no two tasks are taught by the same scan."""
    bundled = load_digits()
    sharp = torch.as_tensor(bundled.images / 16, dtype=torch.float32)
    labels = torch.as_tensor(bundled.target, dtype=torch.int64)
    images = {"sharp": sharp, "blurred": avg_pool2d(sharp[:, None], 3, stride=1, padding=1)[:, 0]}
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    taught = dict(zip(TASKS, order[: LABELED * len(TASKS)].split(LABELED), strict=True))
    rest = order[LABELED * len(TASKS) :]
    chosen = {"train": taught, "val": dict.fromkeys(TASKS, rest[:HELD_OUT])}
    chosen["test"] = dict.fromkeys(TASKS, rest[HELD_OUT:])
    return {part: {task: (images[task][at[task]], labels[at[task]]) for task in TASKS} for part, at in chosen.items()}


def loader(batch: dict[str, Scans], times: int) -> DataLoader[dict[str, Scans]]:
    """The same batch again and again."""
    return DataLoader(cast("Dataset[dict[str, Scans]]", [batch] * times), batch_size=None)


def accuracies(way: str, data: dict[str, dict[str, Scans]], seed: int, steps: int) -> tuple[Scores, Scores]:
    """Train one model; its accuracies in percent on validation and test scans."""
    torch.manual_seed(seed)
    module = model(way)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",  # faster than a GPU for a model of this size
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # All 50 scans of each task in every step: a batch is {task: (images, labels)}.
    trainer.fit(module, loader(data["train"], steps))
    found = []
    for part in ("val", "test"):
        (tested,) = trainer.test(module, loader(data[part], 1), verbose=False)
        found.append({task: 100 * tested[f"test/MulticlassAccuracy/{task}"] for task in TASKS})
    return found[0], found[1]


def deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean(scores: Scores) -> float:
    return statistics.mean(scores.values())


def verdict(ours: Sequence[Scores], theirs: Sequence[Scores], name: str) -> str:
    """The mean difference over the seeds and its 95 % interval."""
    differences = [mean(a) - mean(b) for a, b in zip(ours, theirs, strict=True)]
    line = f"Soft sharing against {name}: {statistics.mean(differences):+.1f} points of accuracy"
    if len(differences) < 2:
        return f"{line}, of one seed: nothing to tell from noise."
    half = margin_of(differences)
    beyond = "beyond noise" if abs(statistics.mean(differences)) > half else "within noise"
    return f"{line} ± {half:.1f} (95 % interval over {len(differences)} seeds): {beyond}."


def table(results: dict[str, list[Scores]], seeds: int) -> Table:
    found = Table(title=f"Accuracy on test scans in percent, mean ± standard deviation over {seeds} seeds")
    for column in ("", *TASKS, "both"):
        found.add_column(column, justify="right" if column else "left")
    for way, scores in results.items():
        cells = [spread([score[task] for score in scores]) for task in TASKS]
        ends = way in (SINGLE, WAYS[-2])
        found.add_row(way, *cells, spread([mean(score) for score in scores]), end_section=ends)
    return found


def draw(results: dict[str, list[Scores]], path: Path) -> None:
    """Accuracy over strength, between the networks apart and the network in common."""
    figure = blank_figure(7.5, 4.2)
    axes = figure.add_subplot()
    for task, color, shift in zip(TASKS, ("tab:blue", "tab:orange"), (0.95, 1.05), strict=True):
        scores = [[score[task] for score in results[way]] for way in WAYS]
        means, bars = [statistics.mean(found) for found in scores], [deviation(found) for found in scores]
        beside = [strength * shift for strength in STRENGTHS]
        axes.errorbar(
            beside, means[1:-1], bars[1:-1], color=color, marker="o", capsize=3, label=f"{task}, soft sharing"
        )
        axes.axhline(means[0], color=color, linestyle=":", label=f"{task}, single-task")
        axes.axhline(means[-1], color=color, linestyle="--", label=f"{task}, hard sharing")
    axes.set_xscale("log")
    axes.set_xlabel("strength of the penalty")
    axes.set_ylabel("accuracy on test scans, %")
    axes.set_title(f"Two tasks with {LABELED} labeled scans each")
    figure.legend(loc="outside lower center", fontsize=8, ncols=3)
    figure.savefig(path, dpi=130)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="seeds, each with a split of its own")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each model")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--picture", type=Path, default=Path("soft_sharing.png"), help="where to draw")
    args = parser.parse_args(arguments)
    if args.repeats < 1 or args.steps < 1:
        parser.error("--repeats and --steps must be at least 1.")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args, console = parse(arguments), Console()
    quieten()
    torch.set_num_threads(1)  # the models are too small to share
    runs = [(seed, way) for seed in range(args.seed, args.seed + args.repeats) for way in WAYS]
    validated: dict[str, list[Scores]] = {way: [] for way in WAYS}
    results: dict[str, list[Scores]] = {way: [] for way in WAYS}
    for seed, way in track(runs, description="training", console=console, transient=True):
        val, test = accuracies(way, load(seed), seed, args.steps)
        validated[way].append(val)
        results[way].append(test)
    soft = WAYS[1:-1]
    # Each seed chooses its strength by its own validation scans, and has its test scans looked at once.
    chosen = [max(soft, key=lambda way: mean(validated[way][index])) for index in range(args.repeats)]
    picked = [results[way][index] for index, way in enumerate(chosen)]
    ordered = {**{way: results[way] for way in WAYS[:-1]}, "soft sharing, strength chosen": picked, HARD: results[HARD]}
    console.print(table(ordered, args.repeats))
    for name in (SINGLE, HARD):
        console.print(verdict(picked, results[name], name), highlight=False)
    for way in (soft[0], HARD):
        console.print(f"\n{way}:", highlight=False)
        console.print(parameter_report(model(way), torch.zeros(LABELED, 8, 8)))
    draw(results, args.picture)
    console.print(f"Accuracy over strength: {args.picture}", highlight=False)


if __name__ == "__main__":
    main()
