"""With ``automatic_optimization = True`` the Trainer's own flags and callbacks serve, as for any LightningModule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner.tuning import Tuner
from torch import Tensor

from lightning_mtl import MultiTaskModule, Weighting
from lightning_mtl.weighting import MGDA, GradNorm, StaticWeights
from tests.plain import WEIGHTS, Plain, momentum
from tests.small import batches, small
from tests.training import History, Memory, fit, flat_parameters, gradients_of, loader, quiet_trainer
from tests.weightings import fixed

WAYS: dict[str, Callable[[], Weighting]] = {
    "losses": lambda: StaticWeights(WEIGHTS),
    "features": lambda: fixed(WEIGHTS, "gramian", at="features"),
    "last layer": lambda: fixed(WEIGHTS, "norms", at="last_layer"),
    "rows": lambda: fixed(WEIGHTS, "gramian"),
}


class Automatic(MultiTaskModule):
    lr = 0.05
    configure: Callable[[Any], Any] = staticmethod(momentum)

    def configure_optimizers(self) -> Any:
        optimizer = self.configure(self.parameters())
        for group in optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else ():
            group["lr"] = self.lr
        return optimizer


def automatic(configure: Callable[[Any], Any] = momentum) -> Automatic:
    module = small(cls=Automatic)
    assert isinstance(module, Automatic)
    module.automatic_optimization, module.configure = True, configure
    return module


def data() -> Any:
    return loader(*batches(4, 3, 4, 2, 4))


def both(way: str, make: Callable[[], list[pl.Callback]], configure: Any = momentum, **arguments: Any) -> Any:
    """Train plain Lightning and ours, with the same flags; return their modules and histories."""
    plain, ours, expected, found = Plain(configure), automatic(configure), History(), History()
    fit(plain, data(), callbacks=[expected, *make()], max_epochs=4, **arguments)
    fit(ours, data(), callbacks=[found, *make(), WAYS[way]()], max_epochs=4, **arguments)
    close(torch.stack(found.parameters), torch.stack(expected.parameters))
    assert found.rates == expected.rates
    close(flat_parameters(ours), flat_parameters(plain))
    return found, expected


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def nothing() -> list[pl.Callback]:
    return []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_accumulation_and_clipping(way: str, algorithm: str) -> None:
    both(way, nothing, accumulate_grad_batches=2, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)


@pytest.mark.parametrize("way", WAYS)
def test_a_schedule_of_accumulation(way: str) -> None:
    both(way, lambda: [GradientAccumulationScheduler({0: 1, 1: 2, 3: 3})])


def scheduled(kind: str, parameters: Any) -> Any:
    optimizer = momentum(parameters)
    if kind == "epochs":
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["epochs", "steps"])
def test_schedulers(kind: str, way: str) -> None:
    found, _ = both(way, nothing, functools.partial(scheduled, kind))
    assert len({rates[0] for rates in found.rates}) >= 4


def test_a_scheduler_that_follows_what_we_log() -> None:
    def configure(parameters: Any) -> Any:
        optimizer = momentum(parameters)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss/a"}}

    history = History()
    fit(automatic(configure), data(), data(), callbacks=[history], max_epochs=4)
    assert history.rates[0] == history.rates[4] == [0.05]
    assert history.rates[-1][0] < 0.05


@pytest.mark.parametrize("way", WAYS)
def test_stochastic_weight_averaging(way: str) -> None:
    both(way, lambda: [StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=1)])


@pytest.mark.parametrize("way", WAYS)
def test_weight_averaging(way: str) -> None:
    both(way, lambda: [EMAWeightAveraging(decay=0.8)])


@pytest.mark.parametrize("way", WAYS)
def test_lr_find(way: str, tmp_path: Path) -> None:
    found = []
    for module, callbacks in ((Plain(), []), (automatic(), [WAYS[way]()])):
        trainer = quiet_trainer(callbacks=callbacks, default_root_dir=tmp_path, max_epochs=4)
        finder = Tuner(trainer).lr_find(module, data(), num_training=15, update_attr=False)
        assert finder is not None
        found.append(finder.results)
    assert found[0]["lr"] == found[1]["lr"]
    assert len(found[1]["loss"]) == len(found[0]["loss"])


def test_gradients_can_be_read_in_lightnings_hooks() -> None:
    class Reading(pl.Callback):
        def __init__(self) -> None:
            self.calls = {"before_backward": 0, "after_backward": 0, "before_step": 0}

        def on_before_backward(self, *_: Any) -> None:
            self.calls["before_backward"] += 1

        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.calls["after_backward"] += 1
            assert all(gradient is not None for gradient in gradients_of(pl_module).values())

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.calls["before_step"] += 1

    reading = Reading()
    fit(automatic(), data(), callbacks=[reading, MGDA(at="features")])
    assert reading.calls == {"before_backward": 5, "after_backward": 5, "before_step": 5}


def test_learning_rates_are_monitored_and_losses_logged() -> None:
    logger = Memory()
    fit(automatic(), data(), callbacks=[LearningRateMonitor(), GradNorm()], logger=logger, log_every_n_steps=1)
    named = {name for _, line in logger.lines for name in line}
    assert {"lr-SGD", "loss/a", "weight/a", "grad_norm/b", "loss_epoch/a"} <= named


@pytest.mark.parametrize(("name", "value"), [("accumulate_grad_batches", 2), ("gradient_clip_val", 0.5)])
def test_what_is_the_modules_is_refused(name: str, value: Any) -> None:
    module = small(**{name: value})
    module.automatic_optimization = True
    reason = rf"{name}={value} is the module's for manual optimization.*Trainer\({name}=\.\.\.\)"
    with pytest.raises(ValueError, match=reason):
        fit(module, data())
