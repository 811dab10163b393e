"""SoftSharing against plain tensors, at both ends of its strength, and what it refuses."""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl.architectures import SoftSharing
from tests.architectures.trunks import TASKS, close, module_of, regression, soft_sharing, stages
from tests.training import Memory, fit, loader


def to_mean(layers: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(list(layers))
    return (stacked - stacked.mean(0)).square().sum()


def between_pairs(layers: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a - b).square().sum() for a, b in itertools.combinations(layers, 2)]).sum()


def nuclear(layers: Sequence[Tensor]) -> Tensor:
    result: Tensor = torch.linalg.matrix_norm(torch.stack([layer.flatten() for layer in layers], dim=1), ord="nuc")
    return result


WRITTEN_OUT: dict[Any, Callable[[Sequence[Tensor]], Tensor]] = {
    "distance_to_mean": to_mean,
    "pairwise": between_pairs,
    "trace_norm": nuclear,
}


def backbones(number: int = 3) -> dict[str, nn.Module]:
    return {task: nn.Sequential(*stages()).double() for task in "abc"[:number]}


@pytest.mark.parametrize("kind", WRITTEN_OUT)
@pytest.mark.parametrize("strength", [0.7, {"0": 0.3, "1.weight": 2.0}, {"": 0.5, "0.0": 0.0}], ids=str)
def test_penalty_and_gradient_as_written_out(kind: Any, strength: Any) -> None:
    torch.manual_seed(0)
    trunk = SoftSharing(backbones(), penalty=kind, strength=strength)
    by_prefix = strength if isinstance(strength, dict) else {"": strength}
    expected = torch.zeros((), dtype=torch.float64)
    parameters = [dict(backbone.named_parameters()) for backbone in trunk.backbones.values()]
    for name in parameters[0]:
        fitting = [prefix for prefix in by_prefix if name == prefix or name.startswith(prefix and f"{prefix}.")]
        if fitting:
            expected = expected + by_prefix[max(fitting, key=len)] * WRITTEN_OUT[kind]([p[name] for p in parameters])
    found = trunk.penalties()["soft_sharing"]
    close(found, expected)
    everything = list(trunk.parameters())
    # Autograd and all of it in double, from the formula.
    ours = torch.autograd.grad(3 * found, everything, materialize_grads=True)
    close(ours, torch.autograd.grad(3 * expected, everything, materialize_grads=True))


@pytest.mark.parametrize("kind", WRITTEN_OUT)
def test_copies_are_moved_alike(kind: Any) -> None:
    trunk = SoftSharing(nn.Sequential(*stages()), tasks=["a", "b"], penalty=kind, strength=1.0)
    gradients = [
        torch.autograd.grad(trunk.penalties()["soft_sharing"], list(backbone.parameters()))
        for backbone in trunk.backbones.values()
    ]
    close(gradients[0], gradients[1])
    assert any(gradient.any() for gradient in gradients[0]) is (kind == "trace_norm")


def alone(strength: float, steps: int, lr: float = 0.1) -> tuple[SoftSharing, list[nn.Sequential]]:
    """A soft-sharing trunk and independent networks from the same start, trained on the same batches."""
    torch.manual_seed(0)
    trunk = soft_sharing(strength=strength)
    module = module_of(trunk, optimizer=functools.partial(torch.optim.SGD, lr=lr))
    networks = [nn.Sequential(copy.deepcopy(trunk.backbones[k]), copy.deepcopy(module.heads[k])) for k in TASKS]
    data = [regression(seed=seed) for seed in range(steps)]
    fit(module, loader(*data))
    for task, network in zip(TASKS, networks, strict=True):
        optimizer = torch.optim.SGD(network.parameters(), lr=lr)
        for inputs, targets in data:
            optimizer.zero_grad()
            nn.functional.mse_loss(network(inputs), targets[task]).backward()
            optimizer.step()
    return trunk, networks


def test_strength_zero_is_independent_networks() -> None:
    trunk, networks = alone(0.0, steps=8)
    assert trunk.penalties() == {}
    for task, network in zip(TASKS, networks, strict=True):
        close(list(trunk.backbones[task].parameters()), list(network[0].parameters()))


def test_large_strength_makes_the_parameters_equal() -> None:
    def distance(trunk: SoftSharing) -> float:
        pairs = zip(*(backbone.parameters() for backbone in trunk.backbones.values()), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)

    free, _ = alone(0.0, steps=60)
    # One step of descent takes all of a difference away, 1 - 2 * 0.01 * 50 = 0, and adds a hundredth of the gradients'.
    bound, _ = alone(50.0, steps=60, lr=0.01)
    assert distance(free) > 0.3
    assert distance(bound) < 0.02


def test_penalty_is_logged_by_its_name_and_never_weighed() -> None:
    memory = Memory()
    module = module_of(soft_sharing())
    fit(module, loader(regression()), logger=memory, log_every_n_steps=1)
    logged = {name for _, line in memory.lines for name in line}
    assert {"penalty/soft_sharing", "loss/a", "weight/b"} <= logged


def test_a_frozen_backbone_only_pulls() -> None:
    trunk = soft_sharing(strength=1.0)
    trunk.backbones["a"].requires_grad_(False)
    trunk.penalties()["soft_sharing"].backward()
    assert all(p.grad is None for p in trunk.backbones["a"].parameters())
    assert all(p.grad is not None for p in trunk.backbones["b"].parameters())
    trunk.requires_grad_(False)
    assert trunk.penalties() == {}


def test_layers_without_a_strength_may_differ() -> None:
    other = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 5))
    trunk = SoftSharing({"a": nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5)), "b": other}, strength={"1": 1.0})
    assert trunk.penalties()["soft_sharing"] > 0


LINEAR = functools.partial(nn.Linear, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"backbones": {"a": LINEAR(), "b": nn.Linear(3, 5)}}, "'weight' has shape [4, 3] for task 'a' and [5, 3]"),
        ({"backbones": {"a": LINEAR(), "b": nn.Linear(3, 4, bias=False)}}, "'bias' of task 'a' has no counterpart"),
        ({"backbones": {"a": nn.Linear(3, 4, bias=False), "b": LINEAR()}}, "'bias' of task 'b' has no counterpart"),
        ({"backbones": LINEAR()}, "tasks=None"),
        ({"backbones": [LINEAR()], "tasks": ["a", "b"]}, "1 backbones for the 2 tasks"),
        ({"backbones": [LINEAR()] * 2, "tasks": ["a", "b"]}, "the same module object"),
        ({"backbones": {"a": LINEAR()}, "tasks": ["b"]}, "omit it"),
        ({"backbones": {"keys": LINEAR()}}, "'keys' cannot name a task"),
        ({"backbones": {}}, "is empty"),
        ({"backbones": LINEAR(), "tasks": ["a", "a"]}, "names a task twice"),
        ({"backbones": LINEAR(), "tasks": ["a"], "strength": -1.0}, "strength=-1.0"),
        ({"backbones": LINEAR(), "tasks": ["a"], "strength": {"conv": 1.0}}, "['weight', 'bias']"),
        ({"backbones": LINEAR(), "tasks": ["a"], "penalty": "l1"}, "penalty='l1'"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        SoftSharing(**arguments)


@pytest.mark.parametrize("given", [3, {"a": [nn.Linear(1, 1)]}, {"a": "net"}])
def test_what_is_no_backbone(given: Any) -> None:
    with pytest.raises(TypeError, match="SoftSharing"):
        SoftSharing(given)


def test_heads_that_the_trunk_does_not_know() -> None:
    trunk = SoftSharing(nn.Linear(3, 4), tasks=["a", "c"])
    with pytest.raises(ValueError, match=r"SoftSharing has the tasks \['a', 'c'\], but was asked for \['b'\]"):
        module_of(trunk)(torch.zeros(1, 3))
