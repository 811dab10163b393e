"""Per-task learning rates over schedulers, against descent written out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from lightning_mtl import MultiTaskModule
from lightning_mtl.learning_rates import GradientNorm, Importance, TaskLearningRate
from lightning_mtl.weighting import StaticWeights
from tests.learning_rates.by_hand import BY_HAND, DECAY, descend, double_batches, double_small
from tests.small import batch, small
from tests.training import History, Memory, fit, flat_parameters, loader
from tests.weightings import fixed

LR, STEPS, EPOCHS = 0.1, 6, 2


def own_rates(**arguments: Any) -> TaskLearningRate:
    return TaskLearningRate([Importance(BY_HAND), GradientNorm(decay=DECAY)], **arguments)


class Scheduled(MultiTaskModule):
    """With the groups that a user asks for, a scheduler of steps, and the base rates as seen in each step."""

    schedule: Callable[[Optimizer], Any] | None = None
    config: dict[str, Any] = {"interval": "step"}  # noqa: RUF012  # replaced, never changed
    by_tensor = False

    def configure_optimizers(self) -> Any:
        lr = torch.tensor(LR, dtype=torch.float64) if self.by_tensor else LR
        optimizer = torch.optim.SGD(self.parameter_groups(lr))
        if self.schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": type(self).schedule(optimizer), **self.config}}  # type: ignore[misc]


def one_cycle(optimizer: Optimizer) -> Any:
    return schedulers.OneCycleLR(optimizer, max_lr=0.2, total_steps=STEPS * EPOCHS, cycle_momentum=False)


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=STEPS * EPOCHS),
    "warm-up": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5)),
    # This one multiplies what it finds in the optimizer: whatever is left there compounds.
    "exponential": lambda optimizer: schedulers.ExponentialLR(optimizer, 0.8),
    "one cycle": one_cycle,
}


def expected_rates(make: Callable[[Optimizer], Any], number: int) -> list[float]:
    """What a scheduler does to an optimizer that nothing else touches."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, rates = make(optimizer), []
    for _ in range(number):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def close(found: MultiTaskModule, expected: MultiTaskModule) -> None:
    # The running means of norms are float32, all else is float64.
    torch.testing.assert_close(flat_parameters(found), flat_parameters(expected), rtol=1e-5, atol=1e-6)


def windows(accumulate: int = 1) -> list[list[Any]]:
    data = double_batches(STEPS * accumulate)
    return [data[i : i + accumulate] for i in range(0, len(data), accumulate)] * EPOCHS


@pytest.mark.parametrize("automatic", [False, True], ids=["manual", "automatic"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_of_steps(name: str, automatic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduled, "schedule", staticmethod(SCHEDULES[name]))
    module, history = double_small(cls=Scheduled), History()
    module.automatic_optimization = automatic
    rates = expected_rates(SCHEDULES[name], STEPS * EPOCHS)
    expected = descend(module, windows(), rates)
    fit(module, loader(*double_batches(STEPS)), callbacks=[own_rates(), history], max_epochs=EPOCHS)
    close(module, expected)
    # What schedulers, monitors and checkpoints see is the scheduler's.
    assert [found[0] for found in history.rates[: len(rates) - 1]] == pytest.approx(rates[1:], rel=1e-12)
    assert all(len(set(found)) == 1 for found in history.rates)


def test_a_scheduler_that_follows_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    def plateau(optimizer: Optimizer) -> Any:
        return schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.9)

    monkeypatch.setattr(Scheduled, "schedule", staticmethod(plateau))
    monkeypatch.setattr(Scheduled, "config", {"monitor": "val/loss/a"})
    module, history = double_small(cls=Scheduled), History()
    # After the first value, none is nine tenths lower: each epoch halves the rate.
    expected = descend(module, windows() + windows(), [LR] * 2 * STEPS + [LR / 2] * STEPS + [LR / 4] * STEPS)
    data = loader(*double_batches(STEPS))
    fit(module, data, data, callbacks=[own_rates(), history], max_epochs=4)
    close(module, expected)
    assert set(history.rates[-1]) == {LR / 8}


@pytest.mark.parametrize("automatic", [False, True], ids=["manual", "automatic"])
@pytest.mark.parametrize("every", [1, 3])
def test_accumulation(every: int, automatic: bool) -> None:
    module = double_small(cls=Scheduled, **({} if automatic else {"accumulate_grad_batches": 2}))
    module.automatic_optimization = automatic
    expected = descend(module, windows(2), [LR] * STEPS * EPOCHS, every=every)
    trainer = {"accumulate_grad_batches": 2} if automatic else {}
    rates = own_rates(every_n_steps=every)
    fit(module, loader(*double_batches(2 * STEPS)), callbacks=[rates], max_epochs=EPOCHS, **trainer)
    close(module, expected)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", ["none", "losses", "features", "trunk"])
def test_the_trunks_share(way: str, accumulate: int) -> None:
    """The multiplier acts in the shared gradient beside the weight; the head's gradient keeps the weight alone."""
    weights = {"a": 0.5, "b": 3.0} if way != "none" else {"a": 1.0, "b": 1.0}
    weighting: list[pl.Callback] = []
    if way != "none":
        weighting = [StaticWeights(weights) if way == "losses" else fixed(weights, "gramian", at=way)]
    module = double_small(cls=Scheduled, accumulate_grad_batches=accumulate)
    expected = descend(module, windows(accumulate), [LR] * STEPS * EPOCHS, shares_trunk=True, weights=weights)
    logger = Memory()
    callbacks = [own_rates(shares_trunk=True), *weighting]
    data = loader(*double_batches(STEPS * accumulate))
    fit(module, data, callbacks=callbacks, max_epochs=EPOCHS, logger=logger, log_every_n_steps=1)
    close(module, expected)
    line = next(line for _, line in logger.lines if "weight/a" in line)
    assert line["weight/a"] == pytest.approx(BY_HAND["a"] * weights["a"])


@pytest.mark.parametrize("automatic", [False, True], ids=["manual", "automatic"])
def test_learning_rates_that_are_tensors(automatic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduled, "by_tensor", True)
    monkeypatch.setattr(Scheduled, "schedule", staticmethod(SCHEDULES["exponential"]))
    module, seen = double_small(cls=Scheduled), []
    module.automatic_optimization = automatic

    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            seen.append([id(group["lr"]) for group in trainer.optimizers[0].param_groups])

    expected = descend(module, windows(), expected_rates(SCHEDULES["exponential"], STEPS * EPOCHS))
    fit(module, loader(*double_batches(STEPS)), callbacks=[own_rates(), Looks()], max_epochs=EPOCHS)
    close(module, expected)
    assert all(ids == seen[0] for ids in seen)
    assert len(set(seen[0])) == 3


def test_logged_are_the_effective_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduled, "schedule", staticmethod(SCHEDULES["exponential"]))
    module, logger = double_small(cls=Scheduled), Memory()
    callbacks = [TaskLearningRate(Importance(BY_HAND)), LearningRateMonitor(logging_interval="step")]
    fit(module, loader(*double_batches(STEPS)), callbacks=callbacks, logger=logger, log_every_n_steps=1)
    lines = [line for _, line in logger.lines if "lr/a" in line][:STEPS]
    monitored = [line for _, line in logger.lines if "lr-SGD/head/a" in line]
    for task, factor in BY_HAND.items():
        assert [line[f"lr/{task}"] for line in lines] == pytest.approx([LR * 0.8**t * factor for t in range(STEPS)])
        assert [line[f"lr-SGD/head/{task}"] for line in monitored] == pytest.approx([LR * 0.8**t for t in range(STEPS)])


@pytest.mark.parametrize(
    "settings", [{"fused": True}, {"fused": True, "lr": torch.tensor(LR)}, {"foreach": True}, {"lr": torch.tensor(LR)}]
)
def test_implementations_of_an_optimizer_agree(settings: dict[str, Any]) -> None:
    found = []
    for chosen in (settings, {"foreach": False}):
        module = small(optimizer=functools.partial(torch.optim.Adam, **({"lr": LR} | chosen)))
        fit(module, loader(*[batch(4, seed) for seed in range(4)]), callbacks=[own_rates()])
        found.append(flat_parameters(module))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
