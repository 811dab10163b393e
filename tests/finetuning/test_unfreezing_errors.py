"""What a freezing schedule refuses, and when."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_mtl import MultiTaskModule
from lightning_mtl.finetuning import GradualUnfreezing
from lightning_mtl.weighting import MGDA, GradNorm
from tests.small import batch, small
from tests.training import fit, loader, quiet_trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of the two"),
        ({"schedule": {1: "trunk"}, "every_n_epochs": 1}, "one of the two"),
        ({"every_n_epochs": 0}, r"every_n_epochs=0\) must be at least 1"),
        ({"schedule": {}}, "must name modules"),
        ({"schedule": {1: []}}, "must name modules"),
        ({"schedule": {-1: "trunk"}}, "has the epoch -1"),
        ({"every_n_epochs": 1, "lr_decay": 0.0}, r"lr_decay=\.\.\.\) holds 0\.0"),
        ({"every_n_epochs": 1, "lr_factors": [1.0, -1.0]}, r"lr_factors=\.\.\.\) holds -1\.0"),
        ({"every_n_epochs": 1, "lr_factors": [1.0], "lr_decay": 0.5}, "not both"),
    ],
)
def test_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualUnfreezing(**arguments)


class OneGroup(MultiTaskModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OnlyTrainable(MultiTaskModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class NoRate(MultiTaskModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameter_groups(), lr=0.1)


FROM_THE_TOP = functools.partial(GradualUnfreezing, every_n_epochs=1)


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (small(), [GradualUnfreezing({1: "trunk.9"})], r"names \['trunk\.9'\], which .* it has \['trunk'"),
        (small(), [GradualUnfreezing({1: "trunk", 2: "trunk.0"})], r"nothing to unfreeze in \['trunk\.0'\] at epoch 2"),
        (small(), [FROM_THE_TOP(layers="encoder")], "names .'encoder'."),
        (small(), [FROM_THE_TOP(lr_factors=[0.5])], r"has 1 numbers for 2 parts to unfreeze, \['2', '0'\]"),
        (small(cls=OneGroup), [FROM_THE_TOP(lr_decay=0.5)], "holds '2' together with other parameters"),
        (small(cls=OnlyTrainable), [FROM_THE_TOP()], r"lacks parameters of \['2', '0'\]"),
        (small(cls=NoRate), [FROM_THE_TOP(lr_decay=0.5)], r"parameter_groups\(lr\)"),
        (small(), [FROM_THE_TOP(), GradNorm(at="trunk.0")], "still frozen when '2' is unfrozen"),
        (small(), [FROM_THE_TOP(), MGDA(at=["trunk.0"])], "still frozen when '2' is unfrozen"),
        (
            small(lr_scheduler=functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=3)),
            [FROM_THE_TOP(lr_decay=0.5)],
            r"OneCycleLR sets one .*max_lr=\[0\.05, 0\.025, 0\.1, 0\.1\], for \['trunk/2', 'trunk/0', 'head/a'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler:RuntimeWarning")
def test_at_setup(module: MultiTaskModule, callbacks: list[pl.Callback], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(module, loader(batch(4)), callbacks=callbacks)


def test_a_frozen_trunk_without_a_schedule_is_still_refused() -> None:
    module = small()
    module.trunk.requires_grad_(False)
    with pytest.raises(ValueError, match="none of them can be trained"):
        fit(module, loader(batch(4)), callbacks=[MGDA()])
    with pytest.raises(ValueError, match="found no parameter to unfreeze"):
        fit(module, loader(batch(4)), callbacks=[FROM_THE_TOP()])


def test_other_modules_and_strategies() -> None:
    with pytest.raises(TypeError, match="found BoringModel"):
        quiet_trainer(callbacks=[FROM_THE_TOP()]).fit(BoringModel())
    trainer = quiet_trainer(callbacks=[FROM_THE_TOP()])
    trainer.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(ValueError, match="FSDP2"):
        FROM_THE_TOP().setup(trainer, small(), "fit")
