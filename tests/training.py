"""Short fits: a quiet Trainer, loaders of ready-made batches, callbacks that look on."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_mtl import Monitor, Signals


class Batches(Dataset[Any]):
    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def loader(*batches: Any) -> DataLoader[Any]:
    """A loader that yields these batches as they are."""
    return DataLoader(Batches(batches), batch_size=None)


def quiet_trainer(**arguments: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(defaults | arguments))


def fit(
    module: pl.LightningModule, train: Any, val: Any = None, *, ckpt_path: Any = None, **arguments: Any
) -> pl.Trainer:
    """Fit with a quiet Trainer, and return it."""
    trainer = quiet_trainer(**arguments)
    trainer.fit(module, train, val, ckpt_path=ckpt_path)
    return trainer


class Steps(Monitor):
    """Keeps every optimizer step's signals, weights and gradients."""

    def __init__(self) -> None:
        self.signals: list[Signals] = []
        self.weights: list[Tensor | None] = []
        self.gradients: list[dict[str, Tensor | None]] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.gradients.append(gradients_of(pl_module))

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        self.signals.append(signals)
        self.weights.append(None if weights is None else weights.clone())


class History(pl.Callback):
    """Keeps the parameters and learning rates after every batch."""

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.rates: list[list[float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.parameters.append(flat_parameters(pl_module))
        self.rates.append(_rates(trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rates.append(_rates(trainer))


class Memory(Logger):
    """Keeps what a logger would write."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "memory"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.lines.append((step or 0, dict(metrics)))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass


def _rates(trainer: pl.Trainer) -> list[float]:
    return [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]


def gradients_of(module: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def flat_parameters(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()
