"""Forty trainings that are killed, each a mixture of method, schedulers, callbacks, data and checkpoints.

    python -m tests.interruption.mixtures FOLDER

kills each with SIGKILL in a process of its own, at a step that its number decides, and leaves the checkpoints there.
"""

from __future__ import annotations

import functools
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.data import Joint, MultiTaskDataModule, Proportional, RoundRobin
from lightning_mtl.finetuning import GradualUnfreezing
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from lightning_mtl.monitors import Convergence, GradientConflict
from lightning_mtl.weighting import DTP, DWA, FAMO, MGDA, RLW, STCH, CAGrad, GradNorm, PCGrad, UncertaintyWeighting
from tests.interruption.training import Killed
from tests.small import batch
from tests.training import quiet_trainer

TASKS, SAMPLES, EPOCHS, MIXTURES = ("a", "b"), 24, 4, 40

WEIGHTINGS: list[Callable[[], Weighting]] = [
    DWA,
    RLW,
    functools.partial(FAMO, losses_after="next_batch"),
    MGDA,
    PCGrad,
    CAGrad,
    functools.partial(STCH, warmup_epochs=2),
    functools.partial(DTP, "accuracy"),
    functools.partial(GradNorm, lr=0.1),
    functools.partial(MGDA, every_n_steps=3),
    functools.partial(UncertaintyWeighting, lr=0.1),
]
SCHEDULERS: list[Callable[[Any], dict[str, Any]]] = [
    lambda optimizer: {"scheduler": lr_scheduler.StepLR(optimizer, 1, gamma=0.8)},
    lambda optimizer: {"scheduler": lr_scheduler.CosineAnnealingLR(optimizer, 40), "interval": "step"},
    lambda optimizer: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.2),
        "monitor": "val/loss/a",
    },
]
CALLBACKS: list[Callable[[], list[pl.Callback]]] = [
    list,
    lambda: [GradualUnfreezing({1: "trunk.2", 2: ["trunk.1", "trunk.0"]})],
    lambda: [TaskLearningRate(Importance(metric="accuracy"), shares_trunk=True)],
    lambda: [Convergence(every_n_steps=1), GradientConflict(every_n_steps=2, figure=False)],
]


class Scheduled(MultiTaskModule):
    scheduler: Callable[[Any], dict[str, Any]]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameter_groups(0.05))
        return {"optimizer": optimizer, "lr_scheduler": self.scheduler(optimizer)}


def datasets(seed: int) -> dict[str, TensorDataset]:
    inputs, targets = batch(SAMPLES, seed, TASKS)
    return {task: TensorDataset(inputs, target) for task, target in targets.items()}


def train(number: int, folder: Path, *, killed: bool = False, ckpt: Path | None = None) -> tuple[MultiTaskModule, Any]:
    """Train a mixture to its end, or until it is killed."""
    drawn = random.Random(number)
    weighting, scheduler, others = drawn.choice(WEIGHTINGS)(), drawn.choice(SCHEDULERS), drawn.choice(CALLBACKS)()
    accumulate, every, check = drawn.choice([1, 1, 2]), drawn.randint(1, 5), drawn.choice([2, 4, 1.0])
    mixing = drawn.choice([Joint(), RoundRobin(), Proportional()])
    automatic, max_steps = drawn.random() < 0.3, drawn.random() < 0.3
    torch.manual_seed(number)
    trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    heads = {task: nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()) for task in TASKS}
    tasks = {task: Task(mse_loss, MetricCollection({"accuracy": BinaryAccuracy()})) for task in TASKS}
    module = Scheduled(trunk, heads, tasks, accumulate_grad_batches=1 if automatic else accumulate)
    module.scheduler, module.automatic_optimization = scheduler, automatic
    # Six batches an epoch, so that windows of two end with it.
    data = MultiTaskDataModule(datasets(11), datasets(12), batch_size=4, steps_per_epoch=6, mixing=mixing)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1, save_on_train_epoch_end=True)
    batches = drawn.randint(every * accumulate, 6 * EPOCHS - 1)  # one checkpoint at least is written before
    batches += accumulate - 1 - batches % accumulate
    torch.manual_seed(99 if ckpt else number)
    trainer = quiet_trainer(
        callbacks=[weighting, *others, saving, *([Killed(batches)] if killed else [])],
        enable_checkpointing=True,
        val_check_interval=check,
        accumulate_grad_batches=accumulate if automatic else 1,
        **({"max_epochs": -1, "max_steps": 6 * EPOCHS // accumulate} if max_steps else {"max_epochs": EPOCHS}),
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt)
    states = {type(c).__name__: c.state_dict() for c in (weighting, *others)}
    return module, [states, trainer.optimizers[0].state_dict(), trainer.lr_scheduler_configs[0].scheduler.state_dict()]


def kill_all(folder: Path) -> None:
    for number in range(MIXTURES):
        process = os.fork()
        if process == 0:
            train(number, folder / str(number), killed=True)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise RuntimeError(f"Mixture {number} was to be killed, but ended with {status}.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    kill_all(Path(sys.argv[1]))
