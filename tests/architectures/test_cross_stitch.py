"""CrossStitch against plain tensors, at the identity, and what it refuses."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl.architectures import CrossStitch
from tests.architectures.trunks import TASKS, close, cross_stitch, module_of, regression, stages
from tests.training import fit, loader


def images() -> list[nn.Module]:
    return [nn.Conv2d(1, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 3, 3)), nn.Flatten()]


def written_out(trunk: CrossStitch, x: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Sums of products, a unit after every stage but the last."""
    own = [list(trunk.get_submodule(f"backbones.{task}").children()) for task in trunk.tasks]
    values = [stages[0](x) for stages in own]
    for stage in range(1, len(own[0])):
        unit = trunk.units[stage - 1]
        unit = unit.view(*unit.shape, *shape) if unit.ndim == 3 else unit
        mixed = [torch.stack([unit[i, j] * value for j, value in enumerate(values)]).sum(0) for i in range(len(values))]
        values = [stages[stage](value) for stages, value in zip(own, mixed, strict=True)]
    return dict(zip(trunk.tasks, values, strict=True))


@pytest.mark.parametrize("channels", [None, [4, 3]], ids=["scalar", "channels"])
@pytest.mark.parametrize("num_tasks", [2, 3])
def test_forward_and_gradient_as_written_out(channels: list[int] | None, num_tasks: int) -> None:
    torch.manual_seed(0)
    trunk = CrossStitch({task: images() for task in "abc"[:num_tasks]}, channels=channels).double()
    for unit in trunk.units:
        nn.init.normal_(unit)
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    ours, theirs = trunk(x), written_out(trunk, x, (1, 1))
    close(ours, theirs)
    weights = [torch.randn_like(value) for value in theirs.values()]
    found, expected = (
        torch.autograd.grad(list(features.values()), list(trunk.parameters()), weights) for features in (ours, theirs)
    )
    close(found, expected)


def test_tokens_are_mixed_along_their_last_dimension() -> None:
    torch.manual_seed(0)
    trunk = CrossStitch({task: stages()[:2] for task in TASKS}, channels=[5], channel_dim=-1)
    nn.init.normal_(trunk.units[0])
    x = torch.randn(2, 7, 3)
    close(trunk(x), written_out(trunk, x, ()))


@pytest.mark.parametrize("channels", [None, [5, 5]], ids=["scalar", "channels"])
def test_identity_is_independent_networks(channels: list[int] | None) -> None:
    torch.manual_seed(0)
    trunk = cross_stitch(alpha=1.0, channels=channels)
    trunk.units.requires_grad_(False)
    module = module_of(trunk)
    networks = [copy.deepcopy(nn.Sequential(trunk.single_task(k), module.heads[k])) for k in TASKS]
    inputs, targets = regression()
    for task, network in zip(TASKS, networks, strict=True):
        close(module(inputs)[task], network(inputs))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(network(inputs), targets[task]).backward()
            optimizer.step()
    fit(module, loader(*[(inputs, targets)] * 5))
    for task, network in zip(TASKS, networks, strict=True):
        close(module(inputs)[task], network(inputs))


def test_start_near_the_identity() -> None:
    trunk = CrossStitch(nn.Sequential(*stages()), tasks=list("abc"), alpha=0.8)
    close(trunk.units[0].data, torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]))
    channels = CrossStitch(nn.Sequential(*stages()), tasks=["a", "b"], channels=[5, 5])
    close(channels.units[1].data[:, :, 3], torch.tensor([[0.9, 0.1], [0.1, 0.9]]))


def test_units_where_they_are_asked_for() -> None:
    x = torch.randn(2, 3)
    trunk = cross_stitch(after=[2], alpha=0.6)
    plain = {task: trunk.single_task(task)(x) for task in TASKS}
    close(trunk(x)["a"], 0.6 * plain["a"] + 0.4 * plain["b"])
    assert len(trunk.units) == 1
    unmixed = cross_stitch(after=[])
    close(unmixed(x)["b"], unmixed.single_task("b")(x))


def test_some_tasks_alone() -> None:
    trunk, x = cross_stitch(), torch.randn(2, 3)
    ran: list[str] = []
    for task in TASKS:
        last = trunk.get_submodule(f"backbones.{task}.2")
        last.register_forward_hook(lambda *_, task=task: ran.append(task))
    assert torch.equal(trunk(x, tasks=["b"])["b"], trunk(x)["b"])
    assert ran == ["b", "a", "b"]


def test_shared_are_the_parameters_up_to_the_last_unit() -> None:
    trunk = cross_stitch()
    own = [p for task in TASKS for p in trunk.get_submodule(f"backbones.{task}.2").parameters()]
    shared = trunk.shared_parameters()
    assert {*shared, *own} == set(trunk.parameters())
    assert not set(shared) & set(own)
    assert module_of(trunk).shared_parameters() == shared


LINEAR = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"backbones": {"a": stages(), "b": stages()[:2]}}, "{'a': 3, 'b': 2}"),
        ({"backbones": {"a": [LINEAR]}}, "pass after=[0]"),
        ({"backbones": {"a": []}}, "at least one"),
        ({"backbones": {"a": stages()}, "after": [3]}, "after=[3]"),
        ({"backbones": {"a": stages()}, "after": [1, 1]}, "each once"),
        ({"backbones": {"a": stages()}, "channels": [5]}, "channels=[5]"),
        ({"backbones": {"a": stages()}, "channels": [5, 0]}, "channels=[5, 0]"),
        ({"backbones": {"a": stages()}, "alpha": 1.5}, "alpha=1.5"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)):
        CrossStitch(**arguments)


def test_a_backbone_that_is_no_sequence_of_stages() -> None:
    with pytest.raises(TypeError, match="stages in order"):
        CrossStitch({"a": nn.Linear(3, 3)})


@pytest.mark.parametrize(
    ("other", "arguments", "error", "complaint"),
    [
        (nn.Linear(3, 6), {}, ValueError, "after stage 0, task 'b' has shape [2, 6] and task 'a' [2, 5]"),
        (nn.LSTM(3, 5), {}, TypeError, "stage 0 of task 'b' returned a tuple"),
        (nn.Linear(3, 5), {"channels": [6]}, ValueError, "stage 0 returned shape [2, 5]"),
        (nn.Linear(3, 5), {"channels": [5], "channel_dim": 2}, ValueError, "channel_dim=2"),
    ],
)
def test_shapes_are_checked_in_the_first_batch(
    other: nn.Module, arguments: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    trunk = CrossStitch({"a": [nn.Linear(3, 5), LINEAR], "b": [other, nn.Linear(5, 3)]}, **arguments)
    with pytest.raises(error, match=re.escape(complaint)):
        trunk(torch.zeros(2, 3))
