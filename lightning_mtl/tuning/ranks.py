"""Trials on several processes under torchrun: rank 0 draws and tells, the others train along."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from lightning_mtl.configured import ConfigurationError


class Ranks:
    """The processes that train a trial together; outside of torchrun, this one alone.

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
        """Whether this is rank 0."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:  # noqa: ANN401 - plain values
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def first_error(self, error: str | None) -> str | None:
        """What went wrong on the first rank where something did, on every rank."""
        if self.size == 1:
            return error
        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, error)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None), None)
