"""The cut between trunk and heads, and gradients handed to autograd."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl.gradients.cut import FeatureCut
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
    assert all(leaf.is_leaf and leaf.requires_grad for leaf in found)
    assert [cut.leaves[leaf] for leaf in found] == [0, 1]
    for leaf in found:
        torch.testing.assert_close(leaf.detach(), cut.outputs[cut.leaves[leaf]].detach(), rtol=0, atol=0)
    uncut = trunk(torch.ones(1, 2))
    assert all(not z.is_leaf for z in tensors_in(uncut))
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
    assert [cut.leaves[leaf] for leaf in (first, second, own)] == [0, 1, 1]
    assert cut.calls == 2


def test_the_cut_ends_with_an_error_too() -> None:
    trunk, cut = Arranged(lambda a, _b: a), FeatureCut()
    with pytest.raises(RuntimeError), cut.applied_to(trunk):
        trunk(torch.ones(1, 3))
    assert not trunk(torch.ones(1, 2)).is_leaf


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
