"""How long a head's steps are when its task's loss is weighted, and when its learning rate is multiplied.

python -m benchmarks.adam_scale [--steps N] [--json PATH]

Two regressions on a shared trunk. One task's loss gets the weight 0.1, 1 or 10, or its head's learning rate is
multiplied by as much; what is printed is the mean length of that head's steps over the first steps, relative to those
with 1, for plain descent and for Adam. No timing: the figures are the same on every machine up to rounding.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from lightning_mtl.weighting import StaticWeights

FACTORS = (0.1, 1.0, 10.0)
OPTIMIZERS: dict[str, Any] = {
    "SGD": functools.partial(torch.optim.SGD, lr=1e-3),
    "Adam": functools.partial(torch.optim.Adam, lr=1e-3),
}
WAYS: dict[str, Any] = {
    "loss weight": lambda factor: StaticWeights({"a": factor}),
    "learning rate": lambda factor: TaskLearningRate(Importance({"a": factor})),
}


class StepLengths(pl.Callback):
    """The length of each step of one head."""

    def __init__(self) -> None:
        self.lengths: list[float] = []
        self._before = torch.zeros(0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self._before = self._parameters(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self.lengths.append(float((self._parameters(pl_module) - self._before).norm()))

    def _parameters(self, module: pl.LightningModule) -> Tensor:
        return torch.cat([p.detach().flatten() for p in module.heads["a"].parameters()])  # type: ignore[index,union-attr]


def mean_step(optimizer: str, way: str, factor: float, steps: int) -> float:
    """The mean step length of the head of task "a"."""
    torch.manual_seed(0)
    inputs = torch.randn(32 * steps, 16)
    targets = {task: inputs @ torch.randn(16, 1) + 0.1 * torch.randn(len(inputs), 1) for task in ("a", "b")}
    module = MultiTaskModule(
        nn.Sequential(nn.Linear(16, 32), nn.ReLU()),
        {task: nn.Linear(32, 1) for task in targets},
        {task: Task(mse_loss) for task in targets},
        optimizer=OPTIMIZERS[optimizer],
    )
    lengths = StepLengths()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[WAYS[way](factor), lengths],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [
        (x, dict(zip(targets, ys, strict=True)))
        for x, *ys in zip(inputs.split(32), *(target.split(32) for target in targets.values()), strict=True)
    ]
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return sum(lengths.lengths) / len(lengths.lengths)


def measure(steps: int) -> dict[str, list[float]]:
    """Relative step lengths, a row for each optimizer and way, a column for each factor."""
    found = {}
    for optimizer in OPTIMIZERS:
        for way in WAYS:
            lengths = [mean_step(optimizer, way, factor, steps) for factor in FACTORS]
            found[f"{optimizer}, {way}"] = [length / lengths[FACTORS.index(1.0)] for length in lengths]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps to average over")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    found = measure(arguments.steps)
    print("step of the head, relative".ljust(28), *(f"x {factor:g}".rjust(8) for factor in FACTORS))
    for name, row in found.items():
        print(name.ljust(28), *(f"{value:8.2f}" for value in row))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"factors": FACTORS, "steps": arguments.steps, "relative": found}, indent=1)
        )


if __name__ == "__main__":
    main()
