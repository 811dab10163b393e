"""Trainings with every callback that acts at an epoch, checkpoints written at any moment, and what a run comes to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.architectures import LTB, Branching, MMoE
from lightning_mtl.control import TaskEarlyStopping
from lightning_mtl.data import MultiTaskDataModule
from lightning_mtl.finetuning import GradualUnfreezing
from lightning_mtl.learning_rates import Importance, Relatedness, TaskLearningRate
from lightning_mtl.monitors import Convergence, GateUsage, GradientConflict, TaskAffinity, Throughput
from lightning_mtl.weighting import CRMOGM, DTP, DWA, LBTW, PIVRG, STCH, Frozen, GradNorm, PCGrad, Rotating
from tests.small import Batch, batch
from tests.training import Memory, quiet_trainer

TASKS = ("a", "b")
EPOCHS, STEPS = 5, 4  # four batches an epoch, a validation after two and after four of them
SAMPLES = 16

# Where a checkpoint is written: the hook, the epoch, the batch of it.
KINDS: dict[str, tuple[str, int, int]] = {
    "after a batch": ("on_train_batch_end", 2, 0),
    "after a batch, before its validation": ("on_train_batch_end", 2, 1),
    "in a validation": ("on_validation_batch_end", 2, 1),
    "after a validation": ("on_validation_end", 2, 1),
    "after an epoch's last batch": ("on_train_batch_end", 1, 3),
    "after the first epoch's last batch": ("on_train_batch_end", 0, 3),
    "after the last epoch's last batch": ("on_train_batch_end", EPOCHS - 1, 3),
    "in an epoch's last validation": ("on_validation_batch_end", 1, 3),
    "after an epoch's last validation": ("on_validation_end", 1, 3),
    "at an epoch's end": ("on_train_epoch_end", 1, 3),
    "at an epoch's begin": ("on_train_epoch_start", 2, -1),
}


class Saving(Checkpoint):
    """Saves at each of these moments, as a ModelCheckpoint does, after all other callbacks have had their turn."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, hook: str, trainer: pl.Trainer) -> None:
        for kind, (wanted, epoch, number) in KINDS.items():
            at = -1 if number == -1 else trainer.fit_loop.epoch_loop.batch_idx
            path = self.folder / f"{kind}.ckpt"
            if (hook, trainer.current_epoch, at) == (wanted, epoch, number) and not path.exists():
                trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save("on_train_batch_end", trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save("on_validation_batch_end", trainer)

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save("on_validation_end", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save("on_train_epoch_end", trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save("on_train_epoch_start", trainer)


def datasets(seed: int) -> dict[str, TensorDataset]:
    inputs, targets = batch(SAMPLES, seed, TASKS)
    return {task: TensorDataset(inputs, target) for task, target in targets.items()}


def own_data() -> MultiTaskDataModule:
    return MultiTaskDataModule(datasets(11), datasets(12), batch_size=SAMPLES // STEPS)


class Samples(torch.utils.data.Dataset[Batch]):
    def __init__(self, seed: int) -> None:
        self.inputs, self.targets = batch(SAMPLES, seed, TASKS)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], {task: target[index] for task, target in self.targets.items()}


class StatefulData(pl.LightningDataModule):
    """Loaders of torchdata, in the data's order."""

    def train_dataloader(self) -> Any:
        return StatefulDataLoader(Samples(11), batch_size=SAMPLES // STEPS)

    def val_dataloader(self) -> Any:
        return StatefulDataLoader(Samples(12), batch_size=SAMPLES // STEPS)


def plain_trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


def branching_trunk() -> nn.Module:
    return LTB([[nn.Linear(3, 4), nn.Linear(3, 4)]], TASKS)


def gated_trunk() -> nn.Module:
    return MMoE([nn.Linear(3, 4), nn.Linear(3, 4)], TASKS, 3)


@dataclass(frozen=True)
class Mixture:
    """Callbacks that train together."""

    callbacks: Callable[[], list[pl.Callback]]
    trunk: Callable[[], nn.Module] = plain_trunk
    data: Callable[[], pl.LightningDataModule] = own_data


MIXTURES = {
    "branches": Mixture(
        lambda: [
            DTP("accuracy"),
            Branching(warmup_epochs=1, harden_epoch=2, heatmaps=False),
            Convergence(every_n_steps=1, metric="accuracy"),
            Throughput(every_n_steps=1),
        ],
        branching_trunk,
    ),
    "thawing": Mixture(
        lambda: [
            DWA(),
            GradualUnfreezing({1: "trunk.2", 2: ["trunk.1", "trunk.0"]}),
            TaskLearningRate(Importance(metric="accuracy"), shares_trunk=True),
        ]
    ),
    "rates that follow": Mixture(
        lambda: [
            CRMOGM(LBTW()),
            TaskLearningRate(Relatedness("target_correlation")),
            GradientConflict(every_n_steps=1, figure=False),
        ],
        data=StatefulData,
    ),
    "measured": Mixture(
        lambda: [GradNorm(lr=0.1), TaskAffinity(every_n_steps=1, figure=False), GateUsage()], gated_trunk
    ),
    "warmed up": Mixture(lambda: [STCH(warmup_epochs=2)]),
    "frozen": Mixture(lambda: [Frozen(GradNorm(lr=0.1), steps=6)]),
    "bargains": Mixture(lambda: [PIVRG()]),
    "rotating": Mixture(lambda: [Rotating(PCGrad())]),
    "stopping": Mixture(
        lambda: [
            PCGrad(),
            # Task a rests soon, the others never: the fit goes on to its end.
            TaskEarlyStopping(
                "accuracy", patience={task: 1 if task == "a" else 99 for task in TASKS}, then="head_only"
            ),
        ]
    ),
}


def scheduled(optimizer: Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)


class Following(MultiTaskModule):
    """Lowers its learning rate after any validation that is not much better."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameter_groups(0.05))
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.2)
        return [optimizer], [scheduled(optimizer), {"scheduler": plateau, "monitor": "val/loss/a"}]


def module_of(mixture: Mixture, cls: type[MultiTaskModule] = MultiTaskModule) -> MultiTaskModule:
    torch.manual_seed(2)
    heads = {task: nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()) for task in TASKS}
    tasks = {
        task: Task(mse_loss, MetricCollection({"accuracy": BinaryAccuracy()}), {"accuracy": 0.9}) for task in TASKS
    }
    return cls(
        mixture.trunk(),
        heads,
        tasks,
        optimizer=functools.partial(torch.optim.Adam, lr=0.05),
        lr_scheduler=scheduled,
    )


@dataclass
class Outcome:
    module: MultiTaskModule
    trainer: pl.Trainer
    lines: list[tuple[int, dict[str, float]]]

    def states(self) -> dict[str, Any]:
        """Everything that a run ends with, but times."""
        found: dict[str, Any] = dict(self.module.state_dict())
        found["optimizer"] = self.trainer.optimizers[0].state_dict()
        found["rates"] = [config.scheduler.state_dict() for config in self.trainer.lr_scheduler_configs]
        found["trained"] = [parameter.requires_grad for parameter in self.module.parameters()]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(callback, (Saving, Throughput)):
                found[type(callback).__name__] = callback.state_dict()
        # Metrics of an interrupted epoch begin anew, as documented; the losses go on.
        for score in found["Recorder"]["scores"]["train"].values():
            score.pop("accuracy", None)
        return found


def run(
    mixture: Mixture,
    *callbacks: pl.Callback,
    data: Callable[[], pl.LightningDataModule] | None = None,
    automatic: bool = False,
    ckpt: Path | None = None,
    cls: type[MultiTaskModule] = MultiTaskModule,
    **arguments: Any,
) -> Outcome:
    module, logger = module_of(mixture, cls), Memory()
    module.automatic_optimization = automatic
    torch.manual_seed(0 if ckpt is None else 99)
    trainer = quiet_trainer(
        callbacks=[*mixture.callbacks(), *callbacks],
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=ckpt is None,
        val_check_interval=2,
        **({"max_epochs": EPOCHS} | arguments),
    )
    trainer.fit(module, datamodule=(data or mixture.data)(), ckpt_path=ckpt)
    return Outcome(module, trainer, logger.lines)


def assert_same(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}/{index}")
    else:
        assert found == expected or found != found, where


def lines_by_step(outcome: Outcome, first: int) -> list[tuple[int, dict[str, float]]]:
    """What was logged from a step on, but the figures of an interrupted epoch's metrics, and times."""
    kept = []
    for step, line in outcome.lines:
        values = {k: float(v) for k, v in line.items() if not k.startswith(("throughput", "train/", "gates"))}
        if step >= first and values:
            kept.append((step, values))
    return kept
