"""Named groups: every parameter once, each in the group of the part that owns it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.tuner.tuning import Tuner
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from tests.small import TASKS, batch, heads, regressions, small, trunk
from tests.training import History, fit, loader, quiet_trainer


def names(groups: list[dict[str, Any]]) -> dict[str, int]:
    return {group["name"]: len(group["params"]) for group in groups}


def assert_complete(module: MultiTaskModule) -> None:
    grouped = [p for group in module.parameter_groups() for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(module.parameters())


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return mse_loss(prediction * self.scale, target)


def test_trunk_heads_and_the_rest() -> None:
    class Extended(MultiTaskModule):
        def __init__(self) -> None:
            super().__init__(trunk(), heads(), {"a": Task(Temperature()), "b": Task(mse_loss)})
            self.extra = nn.Linear(2, 2)

    module = Extended()
    assert names(module.parameter_groups()) == {"trunk": 4, "head/a": 2, "head/b": 2, "rest": 3}
    assert_complete(module)


def test_what_heads_share_is_the_rests_and_what_the_trunk_shares_the_trunks() -> None:
    stem = trunk()
    decoder = nn.Linear(4, 4)
    tied = nn.Linear(4, 4, bias=False)
    first = stem[0]
    assert isinstance(first, nn.Linear)
    tied.weight = nn.Parameter(torch.zeros(4, 4))
    stem.append(tied)
    again = nn.Linear(4, 4, bias=False)
    again.weight = tied.weight
    own = {
        "a": nn.Sequential(decoder, nn.Linear(4, 1)),
        "b": nn.Sequential(decoder, again, nn.Linear(4, 1)),
    }
    module = MultiTaskModule(stem, own, regressions())
    assert names(module.parameter_groups()) == {"trunk": 5, "head/a": 2, "head/b": 2, "rest": 2}
    assert_complete(module)


def test_shared_parameters_outside_of_the_trunk_belong_to_no_head() -> None:
    class Shares(MultiTaskModule):
        def shared_parameters(self) -> list[nn.Parameter]:
            return [*self.trunk.parameters(), *self.heads["a"].parameters()]

    module = small(cls=Shares)
    assert names(module.parameter_groups()) == {"trunk": 4, "head/b": 2, "rest": 2}


def test_rates_and_weight_decay() -> None:
    groups = small().parameter_groups(0.1, trunk_lr=0.01, head_lr={"b": 0.5}, weight_decay=0.2)
    assert {group["name"]: group["lr"] for group in groups} == {"trunk": 0.01, "head/a": 0.1, "head/b": 0.5}
    assert {group["weight_decay"] for group in groups} == {0.2}
    assert all(group.keys() == {"params", "name"} for group in small().parameter_groups())


def test_each_group_has_a_tensor_of_its_own() -> None:
    groups = small().parameter_groups(torch.tensor(0.1))
    assert len({id(group["lr"]) for group in groups}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"parameter_groups\(lr=-1.0\) must be finite"),
        ({"trunk_lr": float("nan")}, r"parameter_groups\(trunk_lr=nan\)"),
        ({"head_lr": {"a": -2.0}}, r"parameter_groups\(head_lr\['a'\]=-2.0\)"),
        ({"weight_decay": -1}, r"parameter_groups\(weight_decay=-1\)"),
        ({"head_lr": {"c": 1.0}}, r"names \['c'\], but the tasks are \['a', 'b'\]"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().parameter_groups(**arguments)


@pytest.mark.parametrize("own_rates", [False, True])
def test_the_optimizer_argument_gets_groups_where_a_callback_needs_them(own_rates: bool) -> None:
    module = small(optimizer=functools.partial(torch.optim.Adam, lr=0.25))
    callbacks = [TaskLearningRate(Importance({"a": 0.5}))] if own_rates else []
    trainer = fit(module, loader(batch()), callbacks=callbacks)
    groups = trainer.optimizers[0].param_groups
    assert [group.get("name") for group in groups] == (["trunk", "head/a", "head/b"] if own_rates else [None])
    assert {group["lr"] for group in groups} == {0.25}


def test_several_groups_of_a_head_are_found_by_their_parameters() -> None:
    class Decays(MultiTaskModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            parts = [("trunk", self.trunk), *self.heads.items()]
            groups = [
                {"params": [p for p in part.parameters() if (p.ndim > 1) == decays], "weight_decay": 0.1 * decays}
                for _, part in parts
                for decays in (True, False)
            ]
            return torch.optim.SGD(groups, lr=0.5)

    module = small(cls=Decays)
    before = {task: [p.detach().clone() for p in module.heads[task].parameters()] for task in TASKS}
    fit(module, loader(batch()), callbacks=[TaskLearningRate(Importance({"a": 0.0}))])
    moved = {
        task: [not torch.equal(p, q) for p, q in zip(before[task], module.heads[task].parameters(), strict=True)]
        for task in TASKS
    }
    assert moved == {"a": [False, False], "b": [True, True]}


def test_rates_given_as_arguments_reach_the_optimizer() -> None:
    module = small(optimizer=functools.partial(torch.optim.SGD, lr=0.1), trunk_lr=0.01, head_lr={"a": 0.5})
    trainer = fit(module, loader(batch()))
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {"trunk": 0.01, "head/a": 0.5, "head/b": 0.1}


def test_a_rate_for_an_unknown_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"head_lr=.* names \['c'\], but the tasks are \['a', 'b'\]"):
        fit(small(head_lr={"c": 0.5}), loader(batch()))


# Schedulers that set rates of their own

RATES = [1e-4, 1e-2, 0.1]  # of the trunk, head a by its own, head b as the optimizer has it


class EachStep(MultiTaskModule):
    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()
        return {**configured, "lr_scheduler": {**configured["lr_scheduler"], "interval": "step", "monitor": "loss/a"}}


def with_rates(make: Callable[..., Any] | None, **settings: Any) -> MultiTaskModule:
    cls = MultiTaskModule if make is None else EachStep
    optimizer = functools.partial(torch.optim.SGD, lr=RATES[2], momentum=0.5)
    given: dict[str, Any] = {"trunk_lr": RATES[0], "head_lr": {"a": RATES[1]}, "lr_scheduler": make}
    return small(cls=cls, optimizer=optimizer, **(given | settings))


def rates_seen(module: MultiTaskModule, *callbacks: Any) -> torch.Tensor:
    history = History()
    fit(module, loader(*[batch(4, seed) for seed in range(6)]), callbacks=[history, *callbacks])
    return torch.tensor(history.rates, dtype=torch.float64)


def in_proportion(seen: torch.Tensor) -> bool:
    return bool(seen.std(dim=0).gt(0).all()) and torch.allclose(seen / seen[:, 2:], torch.tensor(RATES).double() / 0.1)


class Halves(schedulers.LRScheduler):
    def get_lr(self) -> list[Any]:
        return [rate * 0.5**self.last_epoch for rate in self.base_lrs]


class Overwrites(Halves):
    def __init__(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["initial_lr"] = 0.3
        super().__init__(optimizer)


def warmup(optimizer: Optimizer) -> schedulers.LRScheduler:
    return schedulers.LinearLR(optimizer, 0.1, total_iters=2)


SCALING: list[Callable[[Optimizer], Any]] = [
    lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: min(1.0, step / 4)),  # from 0 on
    lambda optimizer: schedulers.CosineAnnealingLR(optimizer, 8),
    lambda optimizer: schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.99),
    lambda optimizer: schedulers.SequentialLR(
        optimizer, [warmup(optimizer), schedulers.PolynomialLR(optimizer, 6)], [2]
    ),
    lambda optimizer: schedulers.ChainedScheduler([warmup(optimizer), schedulers.ExponentialLR(optimizer, 0.9)]),
    Halves,
]


@pytest.mark.parametrize("make", SCALING)
def test_rates_of_parts_survive_schedulers_that_scale(make: Callable[..., Any]) -> None:
    assert in_proportion(rates_seen(with_rates(make)))


# Each with the arguments that are one number for all groups, which is read back from the message as a list.
ABSOLUTE: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (functools.partial(schedulers.OneCycleLR, total_steps=8), {"max_lr": 0.4}),
    (functools.partial(schedulers.CyclicLR, step_size_up=4), {"base_lr": 0.02, "max_lr": 0.4}),
    (functools.partial(SWALR, anneal_epochs=3), {"swa_lr": 0.05}),
    (functools.partial(schedulers.ReduceLROnPlateau, patience=0, threshold=0.99, factor=0.5), {"min_lr": 0.02}),
]


@pytest.mark.parametrize(
    ("make", "numbers", "nest"),
    # torch chains no ReduceLROnPlateau.
    [(*case, nest) for case in ABSOLUTE for nest in (False, True) if not (nest and "min_lr" in case[1])],
)
def test_one_number_for_all_parts_is_refused_with_the_list_that_works(
    make: Callable[..., Any], numbers: dict[str, Any], nest: bool
) -> None:
    def nested(optimizer: Optimizer) -> Any:
        return schedulers.ChainedScheduler([warmup(optimizer), make(optimizer, **numbers)])

    for argument in list(numbers):
        module = with_rates(nested if nest else functools.partial(make, **numbers))
        with pytest.raises(ValueError, match=rf"{argument}=.*'trunk'.*\['trunk', 'head/a', 'head/b'\]") as refused:
            rates_seen(module)
        found = re.search(rf"{argument}=\[(.*?)\]", str(refused.value))
        assert found is not None
        numbers = numbers | {argument: [float(number) for number in found[1].split(", ")]}
    assert in_proportion(rates_seen(with_rates(functools.partial(make, **numbers))))


def test_lists_and_floors_that_a_user_chose_are_left_alone() -> None:
    peaks = [0.3, 0.2, 0.2]
    seen = rates_seen(with_rates(lambda o: schedulers.OneCycleLR(o, peaks, total_steps=8, pct_start=0.5)))
    torch.testing.assert_close(seen.max(dim=0).values, torch.tensor(peaks).double(), rtol=0.1, atol=0)
    seen = rates_seen(with_rates(lambda o: schedulers.CosineAnnealingLR(o, 6, eta_min=1e-5)))
    assert seen[-1].tolist() == pytest.approx([1e-5] * 3)
    for make in (schedulers.CosineAnnealingLR, schedulers.CosineAnnealingWarmRestarts):
        with pytest.raises(ValueError, match=r"eta_min=0\.001\) lies above .* 'trunk' was given, 0\.0001.*LambdaLR"):
            rates_seen(with_rates(lambda o, make=make: make(o, 6, eta_min=1e-3)))
    # Without rates of their own, and with equal ones, plain torch's way is right.
    for given in ({"trunk_lr": None, "head_lr": None}, {"trunk_lr": 0.1, "head_lr": None}):
        rates_seen(with_rates(functools.partial(schedulers.OneCycleLR, max_lr=0.4, total_steps=8), **given))


def test_whoever_else_overwrites_the_rates() -> None:
    with pytest.raises(ValueError, match=r"Overwrites sets one learning rate, initial_lr=0\.3"):
        rates_seen(with_rates(Overwrites))
    with pytest.raises(ValueError, match=r"swa_lrs=\[5e-05, 0\.005, 0\.05\], for \['trunk'"):
        rates_seen(with_rates(None), StochasticWeightAveraging(0.05))
    rates_seen(with_rates(None), StochasticWeightAveraging([0.05, 0.01, 0.02]))
    for search in (
        lambda: rates_seen(with_rates(None), LearningRateFinder(num_training_steps=3)),
        lambda: Tuner(quiet_trainer(max_epochs=1)).lr_find(with_rates(None), loader(batch()), num_training=3),
    ):
        with pytest.raises(ValueError, match=r"finder sets one rate .* 'trunk' \(0\.0001\), 'head/a'"):
            search()


def test_rates_that_do_not_reach_the_optimizer_are_refused() -> None:
    class Own(MultiTaskModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="trunk_lr and head_lr give Own do not reach the optimizer"):
        fit(small(cls=Own, trunk_lr=0.01), loader(batch()))
    fit(small(cls=Own), loader(batch()))
