"""Which leaves a graph ends in, and which of the trunk's layers ran last."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.layers import last_layer, named_parameters_at
from lightning_mtl.gradients.split import Split


def leaf() -> Tensor:
    return torch.ones(2, requires_grad=True)


def test_leaves_are_those_that_autograd_reaches() -> None:
    a, b, c = leaf(), leaf(), leaf()
    frozen = torch.ones(2)
    found = reached_leaves([(a * frozen).sum(), (b.detach() * a).sum()])
    assert set(found) == {a}
    assert set(reached_leaves([(a * b).sum() + 0 * c.sum()])) == {a, b, c}


def test_a_root_may_be_a_leaf_or_need_no_gradient() -> None:
    a = leaf()
    assert list(reached_leaves([a, torch.ones(2)])) == [a]
    assert reached_leaves([]) == {}


@pytest.mark.parametrize("swapped", [False, True])
def test_a_leaf_counts_by_its_last_use(swapped: bool) -> None:
    a, b = leaf(), leaf()
    early = (a * 2).exp()
    middle = b * 3
    late = a * middle
    found = reached_leaves([(early + late if swapped else late + early).sum()])
    assert found[a] > found[b]


def test_a_long_chain_needs_no_recursion() -> None:
    a = leaf()
    x = a
    for _ in range(5000):
        x = x + 1
    assert list(reached_leaves([x])) == [a]


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 20))
def test_random_graphs(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    leaves = [leaf() for _ in range(5)]
    values = list(leaves)
    for _ in range(size):
        i, j = torch.randint(len(values), (2,), generator=generator).tolist()
        values.append(values[i] * values[j] if (i + j) % 3 else values[i].detach() + values[j])
    root = values[-1].sum()
    gradients = torch.autograd.grad(root, leaves, allow_unused=True) if root.requires_grad else [None] * 5
    expected = {x for x, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    assert set(reached_leaves([root])) == expected


class Backwards(nn.Module):
    """Layers that run in the opposite order of their definition."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            x = layer(x)
        return x


def last_names(trunk: nn.Module, *calls: Tensor) -> list[str]:
    split = Split()
    with split.applied_to(trunk):
        for inputs in calls:
            trunk(inputs)
    found = last_layer(trunk, [[output.z for output in split.outputs]], among=trunk.parameters())
    return [name for name, p in trunk.named_parameters() if any(p is other for other in found)]


def test_the_layer_executed_last_not_the_one_defined_last() -> None:
    assert last_names(Backwards(), torch.ones(1, 3)) == ["layers.0.weight", "layers.0.bias"]


def test_a_layer_behind_the_last_without_weights_of_two_dimensions_does_not_count() -> None:
    trunk = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.ReLU())
    assert last_names(trunk, torch.ones(2, 3)) == ["0.weight", "0.bias"]


def test_a_frozen_or_unused_last_layer_does_not_count() -> None:
    trunk = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    trunk[1].requires_grad_(False)
    assert last_names(trunk, torch.ones(2, 3)) == ["0.weight", "0.bias"]
    trunk[0].weight.requires_grad_(False)
    trunk[1].weight.requires_grad_(True)
    assert last_names(trunk, torch.ones(2, 3)) == ["1.weight"]


def test_a_trunk_that_is_itself_a_layer() -> None:
    assert last_names(nn.Linear(3, 3), torch.ones(2, 3)) == ["weight", "bias"]


def test_a_layer_used_twice_counts_by_its_last_use() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    trunk = nn.Sequential(first, second, first)
    assert last_names(trunk, torch.ones(2, 3)) == ["0.weight", "0.bias"]


def test_no_layer_with_weights() -> None:
    with pytest.raises(ValueError, match=r"at='last_layer' found no trainable weight.*measure at 'features'"):
        last_names(nn.LayerNorm(3), torch.ones(2, 3))


def test_named_modules() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, bias=False), "none": nn.ReLU()})
    a, b = module["a"], module["b"]
    found = named_parameters_at(module, ["b", "a", "b"])
    assert [id(p) for p in found] == [id(p) for p in [*b.parameters(), *a.parameters()]]
    a.requires_grad_(False)
    assert [id(p) for p in named_parameters_at(module, ["a", "b"])] == [id(p) for p in b.parameters()]
    with pytest.raises(ValueError, match=r"at=\['a', 'none'\] holds no parameter that can be trained"):
        named_parameters_at(module, ["a", "none"])
    with pytest.raises(ValueError, match=r"names \['c'\], which the module does not have; it has \['a', 'b'\]"):
        named_parameters_at(module, ["c"])
