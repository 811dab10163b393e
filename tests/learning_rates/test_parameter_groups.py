"""Named groups: every parameter once, each in the group of the part that owns it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from tests.small import TASKS, batch, heads, regressions, small, trunk
from tests.training import fit, loader


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
