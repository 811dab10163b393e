"""A training that is killed: trains with checkpoints every few steps, and says what it did.

    python -m tests.interruption.training FOLDER

kills one training for each method, with SIGKILL, in a process of its own, and leaves the checkpoints in FOLDER.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mtl import MultiTaskModule, Weighting
from lightning_mtl.weighting import DWA, FAMO, MGDA, RLW, GradNorm, PCGrad, UncertaintyWeighting
from tests.small import Batch, batch, binary
from tests.training import Memory, fit

TASKS = ("a", "b", "c")
# No checkpoint falls on an epoch's last batch: Lightning counts that epoch twice with a loader that saves its state.
EPOCHS, SAMPLES, BATCH, SAVE_EVERY = 4, 24, 4, 5


@dataclass(frozen=True)
class Case:
    """A method, and the batch in which its training is killed, counted over epochs of six."""

    make: Callable[[], Weighting]
    killed_in: int


CASES = {
    "GradNorm": Case(functools.partial(GradNorm, lr=0.1), 17),
    "UncertaintyWeighting": Case(functools.partial(UncertaintyWeighting, lr=0.1), 14),
    "DWA": Case(DWA, 18),
    "MGDA now and then": Case(functools.partial(MGDA, every_n_steps=3), 10),
    "PCGrad": Case(PCGrad, 11),
    "RLW": Case(RLW, 22),
    "FAMO": Case(FAMO, 13),
}


class Samples(Dataset[Batch]):
    def __init__(self) -> None:
        self.inputs, self.targets = batch(SAMPLES, 11, TASKS)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], {task: target[index] for task, target in self.targets.items()}


class Randomness(pl.Callback):
    """Carries torch's random state over an interruption: the next epoch's order is drawn from it."""

    state: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"state": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict["state"]

    def on_train_start(self, *_: Any) -> None:
        if self.state is not None:
            torch.set_rng_state(self.state)


class Killed(pl.Callback):
    """Ends the process between a backward pass and the optimizer's step, as no process can prevent."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Outcome:
    module: MultiTaskModule
    logged: Memory
    state: dict[str, Tensor]


def module() -> MultiTaskModule:
    return binary(tasks=TASKS, optimizer=functools.partial(torch.optim.Adam, lr=0.05))


def train(name: str, folder: Path, *, seed: int, ckpt: Path | None = None, killed_in: int | None = None) -> Outcome:
    """Train to the end, or until killed; only the checkpoint carries anything from one call to another."""
    ours, weighting, logger = module(), CASES[name].make(), Memory()
    torch.manual_seed(seed)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVE_EVERY, save_top_k=-1)
    fit(
        ours,
        StatefulDataLoader(Samples(), batch_size=BATCH, shuffle=True),
        callbacks=[Randomness(), saving, weighting, *([] if killed_in is None else [Killed(killed_in)])],
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=True,
        max_epochs=EPOCHS,
        ckpt_path=ckpt,
    )
    return Outcome(ours, logger, weighting.state_dict()["state"])


def kill_all(folder: Path) -> None:
    for name, case in CASES.items():
        process = os.fork()
        if process == 0:
            train(name, folder / name, seed=0, killed_in=case.killed_in)
            os._exit(0)
        _, status = os.waitpid(process, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise RuntimeError(f"{name} was to be killed, but ended with {status}.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    kill_all(Path(sys.argv[1]))
