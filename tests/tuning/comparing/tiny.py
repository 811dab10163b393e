"""Two regressions whose targets are in units of 1 and of 1e3, and what a comparison trains of them."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.tuning import Setup

UNITS = {"small": 1.0, "large": 1e3}
STEPS = 60


def collate(rows: list[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs = torch.stack([row[0] for row in rows])
    return inputs, {task: torch.stack([row[1][task] for row in rows]) for task in UNITS}


def loader(seed: int, size: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 4, generator=generator)
    signal = torch.tanh(inputs[:, :1] - inputs[:, 1:2])
    other = torch.tanh(inputs[:, 2:3] + inputs[:, 3:])
    rows = [(x, {"small": a, "large": 1e3 * (b + 2)}) for x, a, b in zip(inputs, signal, other, strict=True)]
    return DataLoader(rows, batch_size=32, collate_fn=collate)  # type: ignore[arg-type]


def model(lr: float) -> MultiTaskModule:
    heads = {task: nn.Linear(16, 1) for task in UNITS}
    tasks = {task: Task(mse_loss) for task in UNITS}
    trunk = nn.Sequential(nn.Linear(4, 16), nn.Tanh())
    return MultiTaskModule(trunk, heads, tasks, optimizer=functools.partial(torch.optim.Adam, lr=lr))


def data(seed: int) -> tuple[Any, ...]:
    return loader(10 * seed, 64), loader(10 * seed + 1, 64), loader(10 * seed + 2, 64)


def trainer() -> pl.Trainer:
    return pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0,
        check_val_every_n_epoch=1000,
    )


def setup() -> Setup:
    return Setup(model=model, data=data, trainer=trainer, lr=1e-2)
