"""A method around another: the inner one lives as if the Trainer held it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_mtl import Signals, Weighting
from lightning_mtl.learning_rates import Factor, TaskLearningRate
from lightning_mtl.method.task_state import TaskState
from lightning_mtl.weighting import CRMOGM, DTP, GradientNormBalance, GradVac, UncertaintyWeighting
from tests.contract_rows import METHODS
from tests.small import batch, batches, binary, small
from tests.training import Steps, fit, flat_parameters, loader

HOOKS = [name for name in vars(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown")]
Wrap = Callable[[Weighting], Weighting]
still: Wrap = functools.partial(CRMOGM, alpha=0.0)
WRAPPERS: dict[str, Wrap] = {"once": still, "twice": lambda method: still(still(method))}
wrapped = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


class Listening(TaskState):
    """Overrides every hook of a callback and keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any]]] = []


class ListeningWeighting(Listening, Weighting):
    def weigh(self, signals: Signals) -> Tensor:
        return torch.ones_like(signals.losses)


class ListeningFactor(Listening, Factor):
    def values(self) -> Tensor:
        return torch.ones(len(self.tasks))


def _listening(name: str) -> Callable[..., None]:
    def hook(self: Listening, *arguments: Any, **named: Any) -> None:
        self.calls.append((name, [_described(argument) for argument in (*arguments, *named.items())]))
        getattr(super(Listening, self), name)(*arguments, **named)

    return hook


for _name in HOOKS:
    setattr(Listening, _name, _listening(_name))


def _described(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.tolist()
    if isinstance(argument, tuple | list):
        return [_described(one) for one in argument]
    return argument if isinstance(argument, str | int | None) else type(argument).__name__


class PerEpoch(Weighting):
    """Doubles task a's weight after every epoch, by a hook that calls no base class."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("factor", torch.tensor(1.0))
        self.factor: Tensor
        self.ended = 0

    def weigh(self, signals: Signals) -> Tensor:
        return self.factor

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ended += 1
        self.factor = self.factor * torch.tensor([2.0, 1.0])


def life(callback: pl.Callback, path: Path) -> None:
    """All that a Trainer does: fits, one of them resumed, one that fails, and the loops without training."""
    module, data = binary(), loader(*batches(4, 4))
    trainer = fit(module, data, data, callbacks=[callback], max_epochs=2, num_sanity_val_steps=1)
    trainer.save_checkpoint(path)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, loader(batch()[0]))
    fit(binary(), data, data, callbacks=[callback], max_epochs=3, ckpt_path=path)
    broken = loader((torch.zeros(4, 99), batch()[1]))
    with pytest.raises(RuntimeError):
        fit(binary(), broken, callbacks=[callback])


@wrapped
def test_every_hook_reaches_the_wrapped_method(wrap: Wrap, tmp_path: Path) -> None:
    alone, inside = ListeningWeighting(), ListeningWeighting()
    life(alone, tmp_path / "alone.ckpt")
    life(wrap(inside), tmp_path / "inside.ckpt")
    assert [name for name, _ in inside.calls] == [name for name, _ in alone.calls]
    assert inside.calls == alone.calls
    # Lightning leaves this one out in manual optimization.
    assert set(HOOKS) - {name for name, _ in alone.calls} <= {"on_before_zero_grad"}


def test_every_hook_reaches_a_factor_of_learning_rates(tmp_path: Path) -> None:
    alone, inside = ListeningWeighting(), ListeningFactor()
    life(alone, tmp_path / "alone.ckpt")
    life(TaskLearningRate(inside), tmp_path / "inside.ckpt")
    assert inside.calls == alone.calls


@wrapped
def test_a_hook_that_calls_no_base_class(wrap: Wrap) -> None:
    results = []
    for method, around in ((PerEpoch(), lambda method: method), (PerEpoch(), wrap)):
        steps = Steps()
        fit(small(), loader(*batches(4, 4)), callbacks=[around(method), steps], max_epochs=3)
        assert method.ended == 3
        results.append([None if weights is None else weights.tolist() for weights in steps.weights])
    assert results[0] == results[1] == [[1.0, 1.0]] * 2 + [[2.0, 1.0]] * 2 + [[4.0, 1.0]] * 2


def course(method: Weighting, precision: Any, **arguments: Any) -> tuple[Tensor, list[Any]]:
    module, steps = binary(accumulate_grad_batches=2), Steps()
    data, val = loader(*batches(4, 3, 4, 4, 2, 4)), loader(batch(8))
    if precision == "64-true":
        module = module.double()
        for one in (data, val):
            one.dataset.batches = [  # type: ignore[attr-defined]
                (x.double(), {task: y.double() for task, y in targets.items()})
                for x, targets in one.dataset.batches  # type: ignore[attr-defined]
            ]
    fit(module, data, val, callbacks=[method, steps], max_epochs=2, precision=precision, **arguments)
    return flat_parameters(module), [None if weights is None else weights.tolist() for weights in steps.weights]


# Frozen by itself measures no more, and inside of another it does: the same weights, summed in another order. Rotating
# is in no other.
@pytest.mark.parametrize("precision", ["32-true", pytest.param("64-true", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name for name, make in METHODS.items() if make().measures != "rows" and name not in ("Frozen", "Rotating")]
)
def test_alpha_0_is_the_method_alone(name: str, precision: str) -> None:
    make, wrap = METHODS[name], WRAPPERS["twice"]
    alone, inside = course(make(), precision), course(wrap(make()), precision)
    assert torch.equal(alone[0], inside[0])
    assert alone[1] == inside[1]


def test_importance_is_what_the_method_makes_of_it() -> None:
    importance = {"a": 3.0}
    alone, inside = (
        course(GradientNormBalance(importance=importance), "32-true"),
        course(CRMOGM(GradientNormBalance(), alpha=0.0, importance=importance), "32-true"),
    )
    assert torch.equal(alone[0], inside[0])


def both() -> Weighting:
    return CRMOGM(CRMOGM(GradVac(beta=0.5), alpha=0.5), alpha=0.3)


def learned() -> Weighting:
    return CRMOGM(CRMOGM(UncertaintyWeighting(lr=0.3), alpha=0.5), alpha=0.3)


def performing() -> Weighting:
    return CRMOGM(DTP("accuracy"), alpha=0.3)


@pytest.mark.parametrize("make", [both, learned, performing, lambda: still(PerEpoch())])
def test_resumed_to_the_bit(make: Callable[[], Weighting], tmp_path: Path) -> None:
    data, val = loader(*batches(4, 4, 3)), loader(batch(8))
    whole, first, second = (binary(optimizer=functools.partial(torch.optim.Adam, lr=0.1)) for _ in range(3))
    fit(whole, data, val, callbacks=[make()], max_epochs=4)
    fit(first, data, val, callbacks=[make()], max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(second, data, val, callbacks=[make()], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(flat_parameters(whole), flat_parameters(second))


def test_a_checkpoint_of_other_children_is_refused(tmp_path: Path) -> None:
    fit(small(), loader(batch()), callbacks=[still(still(PerEpoch()))]).save_checkpoint(tmp_path / "two.ckpt")
    message = r"The checkpoint's CRMOGM held \['CRMOGM'\], this one holds \['PerEpoch'\]; construct it as in"
    with pytest.raises(ValueError, match=message):
        fit(small(), loader(batch()), callbacks=[still(PerEpoch())], max_epochs=2, ckpt_path=tmp_path / "two.ckpt")


def test_keys_are_attributes_of_the_class() -> None:
    assert vars(CRMOGM)["state_key"] == "lightning_mtl.Weighting:CRMOGM"
    assert still(PerEpoch()).state_key == "lightning_mtl.Weighting:CRMOGM"
