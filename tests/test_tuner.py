"""Lightning's tuners replace the callbacks: the module goes on with equal weights, and the weighting comes back."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.tuner.tuning import Tuner
from torch.utils.data import DataLoader, Dataset

from lightning_mtl import MultiTaskModule, Weighting
from lightning_mtl.weighting import DWA, MGDA, GradNorm, UncertaintyWeighting
from tests.small import Batch, batch, small
from tests.training import Steps, flat_parameters, quiet_trainer

METHODS: dict[str, Callable[[], Weighting]] = {
    "GradNorm": functools.partial(GradNorm, lr=0.1),
    "MGDA": MGDA,
    "Uncertainty": functools.partial(UncertaintyWeighting, lr=0.1),
    "DWA": DWA,
}


class Samples(Dataset[Batch]):
    def __init__(self) -> None:
        self.inputs, self.targets = batch(64)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], {task: target[index] for task, target in self.targets.items()}


class Tuned(MultiTaskModule):
    lr = 0.01
    batch_size = 4

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(Samples(), batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Batch]:  # without one, Lightning's batch-size finder fails on any module
        return DataLoader(Samples(), batch_size=self.batch_size)


def tuned() -> Tuned:
    module = small(cls=Tuned)
    assert isinstance(module, Tuned)
    return module


def trained(module: Tuned, weighting: Weighting, steps: Steps, trainer: pl.Trainer) -> None:
    """What the fit after the tuner does is what it would have done without."""
    fresh, other, expected = tuned(), METHODS[name_of(weighting)](), Steps()
    fresh.lr, fresh.batch_size = module.lr, module.batch_size
    assert torch.equal(flat_parameters(fresh), flat_parameters(module))
    quiet_trainer(callbacks=[other, expected], max_epochs=3).fit(fresh)
    trainer.fit(module)
    assert trainer.global_step == len(steps.signals) == len(expected.signals)
    for found, weights in zip(steps.weights, expected.weights, strict=True):
        assert found is not None
        assert torch.equal(found, weights)  # type: ignore[arg-type]  # not None, as `found`
    assert torch.equal(flat_parameters(fresh), flat_parameters(module))


def name_of(weighting: Weighting) -> str:
    return next(name for name in METHODS if type(weighting).__name__.startswith(name))


@pytest.mark.parametrize("name", ["GradNorm", *(pytest.param(n, marks=pytest.mark.slow) for n in [*METHODS][1:])])
def test_lr_find(name: str, tmp_path: Path) -> None:
    module, weighting, steps = tuned(), METHODS[name](), Steps()
    trainer = quiet_trainer(callbacks=[weighting, steps], max_epochs=3, default_root_dir=tmp_path)
    finder = Tuner(trainer).lr_find(module, min_lr=1e-4, max_lr=1.0, num_training=20, update_attr=False)
    assert finder is not None
    rates: list[Any] = finder.results["lr"]
    assert rates[0] == pytest.approx(1e-4, rel=0.5)
    assert rates[-1] == pytest.approx(1.0, rel=0.5)
    assert all(a < b for a, b in itertools.pairwise(rates))
    assert len({round(loss, 6) for loss in finder.results["loss"]}) > 10
    assert steps.signals == []
    trained(module, weighting, steps, trainer)


@pytest.mark.parametrize("name", ["GradNorm", "MGDA"])
def test_scale_batch_size(name: str, tmp_path: Path) -> None:
    module, weighting, steps = tuned(), METHODS[name](), Steps()
    trainer = quiet_trainer(callbacks=[weighting, steps], max_epochs=3, default_root_dir=tmp_path)
    Tuner(trainer).scale_batch_size(module, mode="power", init_val=4, max_trials=2, steps_per_trial=1)
    assert module.batch_size == 8
    assert steps.signals == []
    trained(module, weighting, steps, trainer)
