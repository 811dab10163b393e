"""Whether a long training stays as small as it began: memory, graphs, tensors and open files over thousands of steps.

    python -m benchmarks.soak                  # 20,000 steps, three minutes
    python -m benchmarks.soak --steps 2000
    python -m benchmarks.soak --weighting MGDA --json PATH

Trains with every monitor that the package has, metrics, a penalty, tasks that are absent now and then, validation and
TensorBoard, and prints what the process holds along the way. It ends with an error where the last quarter of the
training holds more tensors, graphs or open files than the quarter before, or much more memory. Linux only.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import argparse
import gc
import importlib
import importlib.util
import inspect
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics.classification import MulticlassAccuracy

from benchmarks.step_time import environment
from lightning_mtl import Monitor, MultiTaskModule, Signals, Task
from lightning_mtl import weighting as methods

LOOKS = 20
EPOCH = 500
ALLOWED_GROWTH = 8 * 2**20  # what an allocator may keep


class Penalized(MultiTaskModule):
    """With a penalty, and a task without a label in every third step."""

    def task_losses(self, batch: Any) -> Any:  # noqa: ANN401
        outputs = dict(super().task_losses(batch))
        if self.trainer.training and self.trainer.global_step % 3 == 1:
            del outputs["pose"]
        return outputs

    def penalties(self) -> dict[str, Tensor]:
        return {"l2": 1e-4 * torch.stack([p.square().sum() for p in self.trunk.parameters()]).sum()}


class Batches:
    """Always new tensors, as from a loader that reads."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.number):
            yield (
                torch.randn(16, 8),
                {
                    "kind": torch.randint(3, (16,)),
                    "size": torch.randn(16, 1),
                    "pose": torch.randn(16, 2),
                },
            )


class Keeps(Monitor):
    """A monitor as users write them, that holds on to the newest step."""

    newest: Signals | None = None

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        self.newest = signals
        if signals.losses.requires_grad or (weights is not None and weights.requires_grad):
            raise AssertionError("Signals and weights must not hold a graph.")


class Gauge(pl.Callback):
    """Looks at the process every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.looks: list[dict[str, float]] = []
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401
        if trainer.global_step % self.every:
            return
        gc.collect()
        tensors = [held for held in gc.get_objects() if issubclass(type(held), Tensor)]
        look = {
            "step": trainer.global_step,
            "seconds": time.perf_counter() - self.begun,
            "resident": resident_bytes(),
            "tensors": len(tensors),
            "with a graph": sum(held.grad_fn is not None for held in tensors),
            "files": len(list(Path("/proc/self/fd").iterdir())),
        }
        self.looks.append(look)
        print(
            f"{look['step']:8.0f} {look['seconds']:8.1f} s {look['resident'] / 2**20:9.1f} MiB"
            f" {look['tensors']:8.0f} {look['with a graph']:8.0f} {look['files']:6.0f}",
            flush=True,
        )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def monitors() -> list[pl.Callback]:
    """All that the package exports and that need no argument, and one of our own."""
    found: list[pl.Callback] = [Keeps()]
    if importlib.util.find_spec("lightning_mtl.monitors") is None:
        return found
    room = importlib.import_module("lightning_mtl.monitors")
    for name in room.__all__:
        cls = getattr(room, name)
        if isinstance(cls, type) and issubclass(cls, Monitor):
            needed = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty and p.kind < 2]
            found += [] if needed else [cls()]
    return found


def module() -> Penalized:
    torch.manual_seed(0)
    return Penalized(
        nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()),
        {"kind": nn.Linear(16, 3), "size": nn.Linear(16, 1), "pose": nn.Linear(16, 2)},
        {"kind": Task(cross_entropy, MulticlassAccuracy(3)), "size": Task(mse_loss), "pose": Task(mse_loss)},
        gradient_clip_val=1.0,
    )


def growth(looks: Sequence[dict[str, float]]) -> list[str]:
    """What the last quarter holds more of, at most, than the one before."""
    quarter = max(1, len(looks) // 4)
    before, last = looks[-2 * quarter : -quarter], looks[-quarter:]
    found = []
    for key, allowed in (("tensors", 0), ("with a graph", 0), ("files", 0), ("resident", ALLOWED_GROWTH)):
        early, late = (max(look[key] for look in part) for part in (before, last))
        if late > early + allowed:
            found.append(f"{key}: {early:.0f} -> {late:.0f}")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps")
    parser.add_argument("--weighting", default="MGDA", help="a class of lightning_mtl.weighting")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    gauge = Gauge(max(1, options.steps // LOOKS))
    print(json.dumps(environment()))
    print(f"{'step':>8} {'time':>10} {'memory':>13} {'tensors':>8} {'graphs':>8} {'files':>6}")
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=options.steps,
            logger=TensorBoardLogger(folder),
            default_root_dir=folder,
            callbacks=[gauge, getattr(methods, options.weighting)(), *monitors()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module(), Batches(EPOCH), Batches(5))
    grown = growth(gauge.looks)
    if options.json is not None:
        options.json.write_text(json.dumps({**environment(), "looks": gauge.looks, "grown": grown}, indent=2) + "\n")
    if grown:
        raise SystemExit(f"Still growing in the last quarter: {'; '.join(grown)}.")
    print("flat")


if __name__ == "__main__":
    main()
