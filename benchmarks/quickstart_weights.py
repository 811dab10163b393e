"""The weights that every method gives to the quickstart's two tasks, for the pictures of the documentation.

    python -m benchmarks.quickstart_weights --json benchmarks/results/quickstart_weights.json

The quickstart's model, data, seed 0 and six epochs, each method with its defaults but for those of ``MAKE``. Aggregators
have no weights and are left out. One step in three is kept. A count of numbers, not of time: any machine serves.
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
from multi_digits import TASKS, Splits, load_splits
from quickstart import TwoDigits, quieten

KEPT = 3  # one step in three
BASELINE = {"accuracy": 0.9}  # near what the single-task models of the quickstart reach
MAKE: dict[str, Callable[[], Weighting]] = {
    "AuxiliaryCosine": functools.partial(methods.AuxiliaryCosine, main="left"),
    "CRMOGM": lambda: methods.CRMOGM(methods.MGDA()),
    "DTP": functools.partial(methods.DTP, "accuracy"),
    "Frozen": lambda: methods.Frozen(methods.MGDA(), steps=100),
    "MetaBalance": functools.partial(methods.MetaBalance, main="left"),
    "STCH": functools.partial(methods.STCH, warmup_epochs=2),  # of six; its default is most of them
    "StaticWeights": functools.partial(methods.StaticWeights, {"left": 1.5, "right": 0.5}),
    "UncertaintyWeighting": functools.partial(methods.UncertaintyWeighting, dict.fromkeys(TASKS, "classification")),
}
SHOWN = {  # how the pages call what is not the default
    "AuxiliaryCosine": 'AuxiliaryCosine(main="left")',
    "CRMOGM": "CRMOGM(MGDA())",
    "DTP": 'DTP("accuracy")',
    "Frozen": "Frozen(MGDA(), steps=100)",
    "MetaBalance": 'MetaBalance(main="left")',
    "STCH": "STCH(warmup_epochs=2)",
    "StaticWeights": 'StaticWeights({"left": 1.5, "right": 0.5})',
    "UncertaintyWeighting": 'UncertaintyWeighting({"left": "classification", "right": "classification"})',
}


class Keep(Monitor):
    """Keeps the weights of one step in ``KEPT``."""

    every_n_steps = KEPT

    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        assert weights is not None
        self.found.append(weights.tolist())


def names() -> list[str]:
    """Every exported method that has weights and needs no other library."""
    found = [name for name in sorted(methods.__all__, key=str.lower) if name != "FromTorchJD"]
    return [name for name in found if not issubclass(getattr(methods, name), Aggregator)]


def train(name: str, splits: Splits, epochs: int) -> dict[str, list[float]]:
    """``{task: weights}`` of one training."""
    torch.manual_seed(0)
    model = TwoDigits(splits.train.images[0].numel())
    for task in model.tasks.values():
        task.baseline = BASELINE
    kept = Keep()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[MAKE.get(name, getattr(methods, name))(), kept],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, splits.train.loader(128, shuffle=True), splits.val.loader(1024))
    return {
        task: [float(f"{value:.4g}") for value in values]
        for task, values in zip(TASKS, zip(*kept.found, strict=True), strict=True)
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names(), help="these methods")
    parser.add_argument("--epochs", type=int, default=6, help="of a training; default: 6, as the quickstart has")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the weights there")
    options = parser.parse_args(argv)
    quieten()
    torch.set_num_threads(1)
    splits, found = load_splits(None, seed=0), {}
    for name in options.only or names():
        found[name] = {"shown": SHOWN.get(name, f"{name}()"), "weights": train(name, splits, options.epochs)}
        ends = {task: values[-1] for task, values in found[name]["weights"].items()}
        print(f"{name:<24} {ends}")
    result = {**environment(), "every_n_steps": KEPT, "epochs": options.epochs, "methods": found}
    if options.json:
        options.json.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
