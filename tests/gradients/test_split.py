"""The split: views of the trunk's outputs in any structure, in-place writes, and how often gradients pass it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.gradients.split import Split
from tests.training import fit, loader
from tests.weightings import fixed


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Frozen:
    low: Tensor
    high: Tensor


class Opaque:
    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high


class Returning(nn.Module):
    """Packs two outputs, and what needs no gradient where the structure has room for it."""

    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.layer, self.pack = nn.Linear(2, 4), pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(self.layer(x), self.layer(x).tanh())


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda a, b: (a, b), lambda z: z),
        (lambda a, b: [a, [b, torch.ones(1)]], lambda z: (z[0], z[1][0])),
        (lambda a, b: OrderedDict(low=a, high=b, name="x"), lambda z: (z["low"], z["high"])),
        (Pair, lambda z: (z.low, z.high)),
        (Frozen, lambda z: (z.low, z.high)),
    ],
    ids=["tuple", "nested list", "mapping", "named tuple", "frozen dataclass"],
)
def test_every_structure_comes_back_with_views_of_its_tensors(pack: Any, unpack: Any) -> None:
    trunk, split, x = Returning(pack), Split(), torch.ones(1, 2)
    with split.applied_to(trunk):
        features = trunk(x)
    assert type(features) is type(trunk(x))
    for view, output in zip(unpack(features), split.outputs, strict=True):
        assert view is output.s
        assert view.data_ptr() == output.z.data_ptr()
    low, high = unpack(features)
    found = torch.autograd.grad((2 * low + high).sum(), [output.edge for output in split.outputs])
    assert [gradient.unique().tolist() for gradient in found] == [[2.0], [1.0]]
    # Nothing is lost for what lies below.
    plain = torch.autograd.grad(sum(unpack(trunk(x))).sum(), list(trunk.parameters()))
    torch.testing.assert_close(torch.autograd.grad((low + high).sum(), list(trunk.parameters())), plain)


@pytest.mark.parametrize("pack", [Opaque, lambda a, b: MappingProxyType({"low": a, "high": b})])
def test_what_cannot_be_rebuilt_is_passed_on_as_it_is(pack: Any) -> None:
    trunk, split = Returning(pack), Split()
    with split.applied_to(trunk):
        features = trunk(torch.ones(1, 2))
    assert type(features) is type(trunk(torch.ones(1, 2)))
    assert split.calls == 1
    assert split.outputs == []


def test_a_tensor_that_is_returned_twice_stays_one() -> None:
    trunk, split = Returning(lambda a, _b: (a, a)), Split()
    with split.applied_to(trunk):
        first, second = trunk(torch.ones(1, 2))
    assert first is second
    assert len(split.outputs) == 1


def test_what_needs_no_gradient_is_no_output() -> None:
    trunk, split = nn.Linear(2, 2).requires_grad_(False), Split()
    with split.applied_to(trunk):
        trunk(torch.ones(1, 2))
    assert (split.calls, split.outputs, split.clean) == (1, [], True)


def test_levels_of_one_call_are_never_upstream_of_each_other() -> None:
    trunk, split = nn.Linear(2, 2, bias=False), Split()

    class Levels(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            low = trunk(x)
            return low, 3 * low

    levels = Levels()
    with split.applied_to(levels):
        _, high = levels(torch.ones(1, 2))
    low_edge, high_edge = (output.edge for output in split.outputs)
    assert torch.autograd.grad(high.sum(), [low_edge, high_edge], allow_unused=True)[0] is None


@pytest.mark.parametrize("writes", [lambda z: z.relu_(), lambda z: z[:, :1].mul_(2), lambda z: z.add_(1)])
@pytest.mark.parametrize("view", [False, True])
def test_where_a_head_wrote_the_gradient_is_that_of_the_value_before(view: bool, writes: Any) -> None:
    trunk = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)), nn.Flatten()) if view else nn.Linear(2, 4)
    x, split = torch.randn(3, 2), Split()
    with split.applied_to(trunk):
        features = trunk(x)
        writes(features)
    assert not split.clean
    [output] = split.outputs
    (found,) = torch.autograd.grad(features.square().sum(), [output.edge])
    value = trunk(x).detach().requires_grad_()
    copy = value * 1
    writes(copy)
    (expected,) = torch.autograd.grad(copy.square().sum(), value)
    torch.testing.assert_close(found, expected)


def test_parts_of_one_memory_that_were_written_into_are_one_output() -> None:
    trunk, split = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2))), Split()

    class Halves(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            z = trunk(x)
            return [z[:, 0], z[:, 1]]

    halves = Halves()
    with split.applied_to(halves):
        first, second = halves(torch.randn(3, 2))
        first.relu_()
    assert len(split.outputs) == 1
    for half in (first, second):
        (found,) = torch.autograd.grad(half.sum(), [split.outputs[0].edge], retain_graph=True)
        assert found.abs().sum() > 0


class Counting(nn.Module):
    """The identity, which counts how often a gradient passes it."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        if y.requires_grad:
            y.register_hook(self._count)
        return y

    def _count(self, gradient: Tensor) -> Tensor:
        self.passes += 1
        return gradient


@pytest.mark.parametrize("shares_decoder", [False, True])
@pytest.mark.parametrize(
    ("place", "weighs_heads", "trunk_passes", "head_passes"),
    [("features", False, 1, 1), ("features", True, 1, 1), ("last_layer", False, 3, 1), ("trunk", False, 2, 1)],
)
def test_how_often_gradients_pass_heads_and_trunk(
    place: str, weighs_heads: bool, trunk_passes: int, head_passes: int, shares_decoder: bool
) -> None:
    """The short way passes each head once; at the trunk, too. A decoder that heads share is passed once a task."""
    above, below, decoder = [Counting(), Counting()], Counting(), nn.Sequential(nn.Linear(4, 4), Counting())
    first = nn.Linear(3, 4)
    heads = {
        task: nn.Sequential(*([decoder] if shares_decoder else []), nn.Linear(4, 1), counting)
        for task, counting in zip("ab", above, strict=True)
    }
    trunk = nn.Sequential(first, nn.Tanh(), below, nn.Linear(4, 4))
    module = MultiTaskModule(trunk, heads, {task: Task(mse_loss) for task in "ab"})
    given = torch.randn(5, 3), {task: torch.randn(5, 1) for task in "ab"}
    weighting = fixed({"a": 2.0, "b": 0.5}, "gramian", at=place, weighs_heads=weighs_heads)
    fit(module, loader(given), callbacks=[weighting])
    assert [counting.passes for counting in above] == [2 if shares_decoder and place != "trunk" else head_passes] * 2
    if place == "last_layer":  # which lies above what counts
        trunk_passes = 1
    assert below.passes == trunk_passes
