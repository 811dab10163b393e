"""The cut between trunk and heads, and gradients handed to autograd."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.inject import inject
from tests.models import Features, Pair, tensors_in


class Arranged(nn.Module):
    """Two outputs in some arrangement."""

    def __init__(self, arrangement: Any) -> None:
        super().__init__()
        self.layer, self.arrangement = nn.Linear(2, 2), arrangement

    def forward(self, x: Tensor) -> Any:
        z = self.layer(x)
        return self.arrangement(z, z.exp())


def origins(cut: FeatureCut, z: Tensor) -> set[int]:
    """Which outputs a tensor stands for."""
    return {cut.leaves[leaf] for leaf in reached_leaves([z]) if leaf in cut.leaves}


@pytest.mark.parametrize(
    ("arrangement", "kind"),
    [
        (lambda a, b: {"a": a, "b": {"c": b}}, dict),
        (lambda a, b: OrderedDict(b=b, a=a), OrderedDict),
        (lambda a, b: (a, [b]), tuple),
        (lambda a, b: [a, (b,)], list),
        (Pair, Pair),
        (Features, Features),
    ],
)
def test_structures_keep_their_form(arrangement: Any, kind: type) -> None:
    trunk, cut = Arranged(arrangement), FeatureCut()
    with cut.applied_to(trunk):
        features = trunk(torch.ones(1, 2))
    found = tensors_in(features)
    assert type(features) is kind
    assert [origins(cut, z) for z in found] == [{0}, {1}]
    for z, output in zip(found, cut.outputs, strict=True):
        assert z.data_ptr() == output.data_ptr()
    assert next(trunk.parameters()) in reached_leaves(tensors_in(trunk(torch.ones(1, 2))))
    assert cut.calls == 1


def test_what_needs_no_gradient_passes_untouched() -> None:
    x, mask = torch.ones(1, 2), torch.tensor([True])
    trunk, cut = Arranged(lambda a, _b: (a, x, mask, "text", None)), FeatureCut()
    with cut.applied_to(trunk):
        features = trunk(x)
    assert len(cut.outputs) == 1
    assert features[1] is x
    assert features[2] is mask
    assert features[3:] == ("text", None)


def test_one_tensor_returned_twice_is_one_output() -> None:
    trunk, cut = Arranged(lambda a, _b: (a, a)), FeatureCut()
    with cut.applied_to(trunk):
        first, second = trunk(torch.ones(1, 2))
    assert len(cut.outputs) == 1
    assert first is second


def test_every_call_adds_outputs_and_every_reader_may_have_leaves_of_its_own() -> None:
    trunk, cut = Arranged(lambda a, _b: a), FeatureCut()
    with cut.applied_to(trunk):
        first, second = trunk(torch.ones(1, 2)), trunk(torch.zeros(1, 2))
    own = cut.own_view(second)
    assert own is not second
    assert [origins(cut, z) for z in (first, second, own)] == [{0}, {1}, {1}]
    assert reached_leaves([second]).keys().isdisjoint(reached_leaves([own]))
    assert cut.calls == 2


def test_the_cut_ends_with_an_error_too() -> None:
    trunk, cut = Arranged(lambda a, _b: a), FeatureCut()
    with pytest.raises(RuntimeError), cut.applied_to(trunk):
        trunk(torch.ones(1, 3))
    z = trunk(torch.ones(1, 2))
    assert origins(cut, z) == set()
    assert trunk.layer.weight in reached_leaves([z])


# What is written in place


@pytest.mark.parametrize("writes", [(0,), (0, 1), ()], ids=str)
def test_later_readers_see_what_an_earlier_one_wrote(writes: tuple[int, ...]) -> None:
    """As plain PyTorch has it, one tensor for all readers."""

    def read(z: Tensor, reader: int) -> Tensor:
        return (z.mul_(reader - 2.0) if reader in writes else z).neg().exp()

    torch.manual_seed(0)
    trunk, x, cut = Arranged(lambda a, _b: a), torch.randn(3, 2), FeatureCut()
    z = trunk(x)
    expected = [read(z, reader) for reader in range(3)]
    with cut.applied_to(trunk):
        features = trunk(x)
        found = [read(cut.own_view(features), reader) for reader in range(3)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
        leaves = list(reached_leaves([ours]))
        assert all(leaf in cut.leaves for leaf in leaves)
        down = torch.autograd.grad(ours.sum(), leaves, retain_graph=True)
        (gradient,) = torch.autograd.grad(
            cut.outputs[0], trunk.layer.weight, torch.stack(down).sum(0), retain_graph=True
        )
        torch.testing.assert_close(
            gradient, torch.autograd.grad(theirs.sum(), trunk.layer.weight, retain_graph=True)[0]
        )


def test_a_value_that_something_needs_is_missed_when_it_was_overwritten() -> None:
    trunk, cut = Arranged(lambda _a, b: b), FeatureCut()
    with cut.applied_to(trunk):
        features = trunk(torch.ones(1, 2))
        cut.own_view(features).relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # the trunk's exp needs its result
        torch.autograd.grad(cut.outputs[0], trunk.layer.weight, torch.ones(1, 2))
    with cut.applied_to(trunk):
        features = trunk(torch.ones(1, 2))
        before = cut.own_view(features).square()
        cut.own_view(features).relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # the square needs what it was given
        torch.autograd.grad(before.sum(), list(cut.leaves), allow_unused=True)


class ReturnsItsParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.ones(2))

    def forward(self, _x: Tensor) -> Tensor:
        return self.query


def read_twice(trunk: nn.Module, write: Callable[[Any, Any], object]) -> None:
    cut = FeatureCut()
    with cut.applied_to(trunk):
        features = trunk(torch.ones(1, 2))
        write(cut.own_view(features), cut.own_view(features))


@pytest.mark.parametrize(
    ("trunk", "write"),
    [
        (Arranged(lambda a, _b: (a, a[:, :1])), lambda _first, last: last[1].relu_()),
        (Arranged(lambda a, _b: a), lambda _first, last: last.detach().relu_()),
        (Arranged(lambda a, _b: a), lambda first, _last: first.relu_()),
        (ReturnsItsParameter(), lambda _first, last: last.relu_()),
    ],
    ids=["another output's memory", "without gradients", "too late", "parameter"],
)
def test_writing_where_gradients_cannot_follow_is_refused(trunk: nn.Module, write: Any) -> None:
    with pytest.raises(ValueError, match="was written in place where its gradient can not follow"):
        read_twice(trunk, write)


def test_a_tensor_that_comes_twice_is_one_to_its_reader() -> None:
    read_twice(Arranged(lambda a, _b: (a, {"again": a})), lambda _first, last: last[0].relu_().add(last[1]["again"]))


# Injected gradients


def test_injected_gradients_arrive_once_and_times_the_incoming_one() -> None:
    x, w = torch.ones(2, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    z = x * 2
    incoming = []

    def gradients(outer: Tensor) -> list[Tensor]:
        incoming.append(outer)
        return [outer * torch.tensor([1.0, 4.0]), outer * 5]

    value = inject(torch.tensor(7.0), [z, w], gradients)
    assert value.item() == 7.0
    (value * 0.5).backward()
    assert [float(outer) for outer in incoming] == [0.5]
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.tolist() == [1.0, 4.0]
    assert w.grad.item() == 2.5
