"""The weights that every method gives to the quickstart's tasks, for the pictures of the documentation.

    python -m benchmarks.quickstart_weights --json benchmarks/results/quickstart_weights.json

The quickstart's model and data, seed 0 and four epochs (later, the losses are near 0), the targets of ink standardized.
Each method has its defaults, but for what ``MAKE`` says. Aggregators have no weights and are left out. One step in
three is kept, None where the task has no label in it. Nothing is timed: any machine serves.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from benchmarks.step_time import environment
from lightning_mtl import Aggregator, Monitor, Signals, Weighting
from lightning_mtl import weighting as methods
from program import quieten
from quickstart import STEPS_AN_EPOCH, DigitTasks
from scans import INK, MAIN, TASKS, Splits, load_splits

KEPT = 3  # one step in three
# Near what the models of each task alone reach.
BASELINES = {task: {"accuracy": 0.72 if task == MAIN else 0.97} for task in TASKS if task != INK} | {INK: {"rmse": 7.0}}
KINDS = {task: "regression" if task == INK else "classification" for task in TASKS}
MAKE: dict[str, tuple[str, Callable[[], Weighting]]] = {
    "CRMOGM": ("CRMOGM(MGDA())", lambda: methods.CRMOGM(methods.MGDA())),
    "DTP": ('DTP("accuracy"), without ink', functools.partial(methods.DTP, "accuracy")),
    "Frozen": ("Frozen(MGDA(), steps=100)", lambda: methods.Frozen(methods.MGDA(), steps=100)),
    "STCH": ("STCH(warmup_epochs=1)", functools.partial(methods.STCH, warmup_epochs=1)),
    "StaticWeights": ('StaticWeights({"digit": 3.0})', functools.partial(methods.StaticWeights, {MAIN: 3.0})),
    "UncertaintyWeighting": (
        "UncertaintyWeighting(kinds)",
        functools.partial(methods.UncertaintyWeighting, KINDS),  # type: ignore[arg-type]  # a dict of literals
    ),
}


class Keep(Monitor):
    """Keeps the weights of one step in ``KEPT``."""

    every_n_steps = KEPT

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        if weights is not None:
            self.found.append(dict(zip(signals.tasks, weights.tolist(), strict=True)))


def names() -> list[str]:
    """Every exported method that has weights and needs no other library."""
    found = [name for name in sorted(methods.__all__, key=str.lower) if name != "FromTorchJD"]
    return [name for name in found if not issubclass(getattr(methods, name), Aggregator)]


def train(name: str, splits: Splits, epochs: int) -> dict[str, Any]:
    """What was given, and ``{task: weights}`` of one training."""
    torch.manual_seed(0)
    model = DigitTasks([task for task in TASKS if name != "DTP" or task != INK], standardize=True)
    for task, baseline in BASELINES.items():
        if task in model.tasks:
            model.tasks[task].baseline = baseline
    shown, make = MAKE.get(name, (f"{name}()", getattr(methods, name)))
    kept = Keep()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[make(), kept],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, splits.train.training_loader(STEPS_AN_EPOCH), splits.val.loader())
    weights = {
        task: [float(f"{found[task]:.4g}") if task in found else None for found in kept.found] for task in model.tasks
    }
    return {"shown": shown, "weights": weights}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names(), help="these methods")
    parser.add_argument("--epochs", type=int, default=4, help="of a training; default: 4")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the weights there")
    options = parser.parse_args(argv)
    quieten()
    torch.set_num_threads(1)
    splits, found = load_splits(seed=0), {}
    for name in options.only or names():
        found[name] = train(name, splits, options.epochs)
        ends = {task: values[-1] for task, values in found[name]["weights"].items()}
        print(f"{name:<24} {ends}")
    result = {**environment(), "every_n_steps": KEPT, "epochs": options.epochs, "methods": found}
    if options.json:
        options.json.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
