"""A script as one starts it on each of several machines: trains, and rank 0 writes its parameters to a file.

python -m tests.distributed.node FILE NODES
"""

from __future__ import annotations

import os
import sys

import lightning.pytorch as pl
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.weighting import MGDA
from tests.conftest import pytest_configure as be_quiet

SAMPLES, BATCH = 32, 8


class Module(MultiTaskModule):
    """Two regressions in double precision."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        heads = {task: torch.nn.Linear(4, 1) for task in "ab"}
        tasks = {task: Task(mse_loss) for task in "ab"}
        trunk = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
        super().__init__(trunk, heads, tasks, optimizer=lambda ps: torch.optim.Adam(ps, lr=1e-2))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor | None:
        inputs, targets = batch
        return super().training_step((inputs, {"a": targets[:, :1], "b": targets[:, 1:]}), batch_idx)


def train(nodes: int) -> torch.Tensor:
    """Train as the guide's ``train.py`` does, on one process a node; a node sees its share of every batch."""
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*(torch.randn(SAMPLES, width, generator=generator, dtype=torch.float64) for width in (3, 2)))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=nodes,
        strategy="ddp" if nodes > 1 else "auto",
        precision="64-true",
        max_epochs=2,
        callbacks=[MGDA()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    # A rank takes every second sample, so that the ranks' batches make up the whole ones.
    share: DistributedSampler[int] = DistributedSampler(
        data, nodes, rank=int(os.environ.get("RANK", "0")), shuffle=False
    )
    trainer.fit(module, DataLoader(data, batch_size=BATCH // nodes, sampler=share))
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


if __name__ == "__main__":
    be_quiet()
    trained = train(int(sys.argv[2]))
    if torch.distributed.get_rank() == 0:
        torch.save((trained, torch.distributed.get_world_size()), sys.argv[1])
    torch.distributed.destroy_process_group()
