"""Trains one trial, from its configuration to the goals' values, on one process or several."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_mtl.configured import MultiTaskCLI
from lightning_mtl.configured.messages import ConfigurationError
from lightning_mtl.distributed import of_each, of_first
from lightning_mtl.transfer.progress import quiet
from lightning_mtl.tuning.goals import Goal


class TrialProcesses:
    """Connects the processes that train a trial together under torchrun; otherwise there is only this one.

    Raises:
        ConfigurationError: If torchrun has started another number of processes than the Trainer trains on.
    """

    def __init__(self, trainer_world_size: int) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.size != trainer_world_size:
            if self.size == 1:
                raise ConfigurationError(
                    f"the Trainer trains on {trainer_world_size} processes, which have to be there before a trial is "
                    f"drawn: torchrun --nproc-per-node {trainer_world_size} -m lightning_mtl.cli tune ..., or set "
                    "trainer.devices: 1."
                )
            raise ConfigurationError(
                f"torchrun has started {self.size} processes, and the Trainer trains on {trainer_world_size}; set "
                "trainer.devices, trainer.num_nodes and trainer.strategy: ddp accordingly."
            )
        if self.size > 1 and not dist.is_initialized():
            # Before the Trainer, which takes over what it finds: plain objects travel over gloo.
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    @property
    def leads(self) -> bool:
        """Return whether this is rank 0."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401 - plain values
        """Return rank 0's value on every rank."""
        return value if self.size == 1 else of_first(value)

    def first_error(self, error: str | None) -> str | None:
        """Return the error of the first rank that has one, on every rank."""
        if self.size == 1:
            return error
        found: list[str | None] = of_each(error)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None), None)


class RankError(RuntimeError):
    """Is raised on all ranks of a trial for an error on one of them."""


@dataclass(frozen=True)
class Job:
    """Holds one seed of one trial.

    Args:
        configuration: All of it.
        folder: Where its logs and checkpoints go.
        drawn: The trial's values, for TensorBoard's HParams tab.
    """

    configuration: Mapping[str, Any]
    folder: Path
    drawn: Mapping[str, Any]


def train(job: Job, goals: Sequence[Goal], callbacks: Sequence[pl.Callback] = ()) -> list[float]:
    """Train as ``lightning-mtl fit`` does, and return the value of each goal.

    What reaches the numbers is what ``fit`` makes of the same configuration; logger, folder and progress bar differ.

    Raises:
        ConfigurationError: If a constructor refuses its values, or a goal is not logged.
        ValueError: If a goal's value is not finite.
        KeyboardInterrupt: If the training was interrupted.
    """
    values = deepcopy(dict(job.configuration))
    logger = {"save_dir": str(job.folder.parent), "name": "", "version": job.folder.name, "default_hp_metric": False}
    values["trainer"].update(
        logger={"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": logger},
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with quiet():
        cli = MultiTaskCLI(values, run=False, exit_on_error=False)
        cli.trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
        tensorboard = cli.trainer.logger
        if isinstance(tensorboard, TensorBoardLogger):
            tensorboard.hparams = dict(job.drawn)
        cli.model.recorder.results = [goal.name for goal in goals]
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        except SystemExit as error:  # Lightning's way to end after Ctrl-C
            raise KeyboardInterrupt from error
    logged = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    found = [goal.value(logged) for goal in goals]
    if isinstance(tensorboard, TensorBoardLogger):
        means = {goal.name: value for goal, value in zip(goals, found, strict=True) if goal.name not in logged}
        tensorboard.log_metrics(means, step=cli.trainer.global_step)
        tensorboard.finalize("success")
    return found
