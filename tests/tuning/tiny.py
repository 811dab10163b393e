"""A configuration whose training takes a blink, and data that can hold a worker up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

HOLD = "TINY_DATA_HOLD_AT"  # the worker waits forever in its trial of this number, counted from 0


class Batches(DataLoader[Any]):
    """``(inputs, {task: target})``."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for inputs, left, right in super().__iter__():
            yield inputs, {"left": left, "right": right}


class TinyData(pl.LightningDataModule):
    """Two regressions on four inputs."""

    trials = 0

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Batches:
        if os.environ.get(HOLD) == str(TinyData.trials):
            time.sleep(600)
        TinyData.trials += 1
        return Batches(_pairs(0), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> Batches:
        return Batches(_pairs(1), batch_size=self.batch_size)


def _pairs(seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs: Tensor = torch.randn(16, 4, generator=generator)
    return TensorDataset(inputs, inputs[:, :1] - inputs[:, 1:2], inputs.square().sum(dim=1, keepdim=True))


def linear(inputs: int, outputs: int) -> dict[str, Any]:
    return {"class_path": "torch.nn.Linear", "init_args": {"in_features": inputs, "out_features": outputs}}


def configuration(folder: Path, **trainer: Any) -> dict[str, Any]:
    """What trains two tasks for two epochs."""
    task = {
        "loss": "torch.nn.functional.mse_loss",
        "metrics": {"class_path": "torchmetrics.MeanSquaredError"},
    }
    return {
        "seed_everything": 3,
        "model": {
            "class_path": "MultiTaskModule",
            "init_args": {
                "trunk": {"class_path": "MLP", "init_args": {"widths": [4, 8]}},
                "heads": {"right": linear(8, 1), "left": linear(8, 1)},
                "tasks": {"right": task, "left": task},
                "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-2}},
            },
        },
        "data": {"class_path": "tests.tuning.tiny.TinyData"},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "enable_checkpointing": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "GradNorm"}],
            **trainer,
        },
    }


SPACE = {
    "objective": "val/loss/total",
    "weighting": ["StaticWeights", "GradNorm"],
    "importance": "simplex",
    "parameters": {
        "model.optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True},
        "model.trunk.widths": {"choices": [[4, 8], [4, 16, 8]]},
    },
}


class Fixed(optuna.samplers.RandomSampler):
    """Draws what it was told to."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__()
        self.values = values

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self.values[trial.number]
