"""Groups of experts: stacked where they can be, the same numbers either way, and what is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl.architectures import CGC, MTAN, PLE, DSelectK, MMoE
from lightning_mtl.architectures.experts import BatchedMLP, ExpertList, expert_group
from tests.architectures.models import HIDDEN, INPUTS, TASKS, WIDTH, expert


def makes(modules: Sequence[nn.Module]) -> Callable[[], nn.Module]:
    """A function that makes copies of these, in turn."""
    remaining = iter(modules)
    return lambda: copy.deepcopy(next(remaining))


def nested() -> nn.Module:
    block = nn.Sequential(nn.Linear(INPUTS, HIDDEN, bias=False), nn.GELU())
    return nn.Sequential(block, nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.LeakyReLU(0.2)))


@pytest.mark.parametrize("make", [expert, nested, functools.partial(nn.Linear, INPUTS, WIDTH)])
@pytest.mark.parametrize("shape", [(6, INPUTS), (2, 3, INPUTS)])
def test_stacked_experts_give_the_numbers_of_a_loop(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    modules = [make().double() for _ in range(4)]
    stacked, loop = expert_group(makes(modules), 4, "test"), expert_group(modules, None, "test")
    assert isinstance(stacked, BatchedMLP)
    assert isinstance(loop, ExpertList)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(4, *shape[:-1], WIDTH, dtype=torch.float64)
    torch.testing.assert_close(stacked(x), loop(x), rtol=0, atol=1e-10)
    names = list(dict(modules[0].named_parameters()))
    assert [name for name, _ in stacked.named_parameters()] == (names if len(names) > 2 else ["0.weight", "0.bias"])
    (of_x, *ours), (of_x_too, *theirs) = (
        torch.autograd.grad(group(x), [x, *group.parameters()], seed) for group in (stacked, loop)
    )
    torch.testing.assert_close(of_x, of_x_too, rtol=0, atol=1e-10)
    for position, gradient in enumerate(ours):
        expected = torch.stack(theirs[position :: len(ours)])
        expected = expected.mT if expected.ndim == 3 else expected  # weights lie as [E, in, out]
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def tied() -> Callable[[], nn.Module]:
    shared = nn.Linear(INPUTS, WIDTH)
    return lambda: nn.Sequential(shared)


def frozen_in_turn() -> Callable[[], nn.Module]:
    modules = [nn.Linear(INPUTS, WIDTH) for _ in range(2)]
    modules[1].requires_grad_(False)
    return makes(modules)


def activation_twice() -> nn.Module:
    tanh = nn.Tanh()
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), tanh, nn.Linear(WIDTH, WIDTH), tanh)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Odd(INPUTS, WIDTH),
        lambda: nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.LayerNorm(WIDTH)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(INPUTS, WIDTH)),
        tied(),
        frozen_in_turn(),
        activation_twice,
    ],
)
def test_what_is_no_chain_of_equal_layers_runs_one_by_one(make: Callable[[], nn.Module]) -> None:
    group = expert_group(make, 2, "test")
    assert isinstance(group, ExpertList)
    x = torch.randn(4, INPUTS)
    torch.testing.assert_close(group(x), torch.stack([module(x) for module in group]))


def test_frozen_experts_stay_frozen() -> None:
    group = expert_group(lambda: nn.Linear(INPUTS, WIDTH).requires_grad_(False), 2, "test")
    assert isinstance(group, BatchedMLP)
    assert not any(parameter.requires_grad for parameter in group.parameters())


def test_experts_of_any_shape_and_a_gate_of_the_users_own() -> None:
    modules = [nn.Sequential(nn.Conv2d(1, channels, 3), nn.Conv2d(channels, 2, 1)) for channels in (2, 4)]

    def gate(num_experts: int) -> nn.Module:
        return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, num_experts))

    trunk, x = MMoE(modules, TASKS, gate), torch.randn(3, 1, 8, 8)
    q = trunk.gates["b"](x).softmax(1)
    expected = q[:, 0, None, None, None] * modules[0](x) + q[:, 1, None, None, None] * modules[1](x)
    torch.testing.assert_close(trunk(x)["b"], expected)


def test_different_experts_for_each_task() -> None:
    groups: dict[str, list[nn.Module]] = {k: [expert()] for k in (*TASKS, "shared")}
    groups["b"].append(nn.Linear(INPUTS, WIDTH))
    trunk, x = CGC(groups, TASKS, INPUTS), torch.randn(4, INPUTS)
    q = trunk.levels[0].get_submodule("gates.b")(x).softmax(1)
    outputs = [module(x) for module in (*groups["b"], *groups["shared"])]
    expected = torch.stack([q[:, i : i + 1] * y for i, y in enumerate(outputs)]).sum(0)
    torch.testing.assert_close(trunk(x)["b"], expected)


MAPS = torch.zeros(2, 1, 8, 8)
CONV = nn.Conv2d(1, 2, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MMoE([], TASKS, 3), "MMoE was given no expert"),
        (lambda: MMoE(expert, TASKS, 3), "MMoE needs to know how many experts to make: at least 1, found None"),
        (lambda: MMoE([expert()], TASKS, 3, num_experts=2), "given 1 experts, but their number as 2"),
        (
            lambda: MMoE(expert(), TASKS, 3),
            "The experts of MMoE are a Sequential; give a list of modules or",
        ),
        (lambda: MMoE([3], TASKS, 3), "Expert 0 of MMoE must be a torch.nn.Module, found int"),  # type: ignore[list-item]
        (lambda: MMoE(expert, [], 3, num_experts=2), "must be a sequence of one task or more"),
        (lambda: MMoE(expert, "ab", 3, num_experts=2), "must be a sequence of one task or more"),
        (lambda: MMoE(expert, ["a", "a"], 3, num_experts=2), "names a task twice"),
        (lambda: MMoE(expert, TASKS, 0, num_experts=2), "The gate of task 'a' in MMoE: gate=0 must be the number"),
        (lambda: MMoE(expert, TASKS, nn.Linear(5, 2), num_experts=2), "each task needs a gate of its own"),
        (lambda: PLE([expert], TASKS, [5, 3]), "takes experts and a gate for each level, found 1 and 2"),
        (lambda: CGC(expert, ["shared", "a"], 5), "has a task 'shared', the name of the shared stream; rename"),
        (lambda: CGC({"a": [expert()]}, ["a"], 5), "given for ['a']; lists for ['a', 'shared'] are needed"),
        (lambda: CGC(expert, TASKS, 5, task_experts=0), "CGC for 'a' needs to know how many experts to make"),
        (lambda: DSelectK(expert, TASKS, num_experts=1), "a single expert, of which there is nothing to select"),
        (lambda: DSelectK(expert, TASKS, num_experts=3, num_selected=4), "num_selected=4) must be from 1 to the 3"),
        (lambda: DSelectK(expert, TASKS, num_experts=3, gate=0), "DSelectK(gate=0) must be the number of features"),
        (lambda: DSelectK(expert, TASKS, num_experts=3, gamma=0.0), "DSelectK(gamma=0.0) must be above 0"),
        (lambda: DSelectK(expert, TASKS, num_experts=3, entropy=-1.0), "DSelectK(entropy=-1.0) must be finite and"),
        (lambda: MTAN([CONV], TASKS, [2, 2]), "found 1 stages and 2 entries in channels"),
        (lambda: MTAN([CONV], TASKS, [0]), "MTAN(channels=...) gives stage 0 0; channels must be at least 1"),
        (lambda: MTAN([(CONV, CONV, CONV)], TASKS, [2]), "Stage 0 of MTAN has 3 parts"),  # type: ignore[list-item]
        (lambda: MTAN(["conv"], TASKS, [2]), "Stage 0 of MTAN must be a torch.nn.Module or a pair"),  # type: ignore[list-item]
        (lambda: MTAN([CONV], TASKS, [2], layout="map"), "MTAN(layout='map') must be 'maps'"),  # type: ignore[arg-type]
    ],
)
def test_refused_at_construction(make: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (
            lambda: MMoE(expert, TASKS, 4, num_experts=2),
            None,
            "The gate of task 'a' in MMoE was built for 4 numbers",
        ),
        (lambda: MMoE(lambda: expert(9), TASKS, INPUTS, num_experts=2), None, "first layer takes 9 features"),
        (lambda: MMoE([expert(), expert(9)], TASKS, INPUTS), None, "Expert 1 of MMoE failed on an input of shape"),
        (
            lambda: MMoE([expert(), expert(INPUTS, 2)], TASKS, INPUTS),
            None,
            r"Expert 1 of MMoE returned shape \[4, 2\] and expert 0 \[4, 3\]",
        ),
        (lambda: MMoE(expert, TASKS, lambda n: nn.Linear(INPUTS, n + 1), num_experts=2), None, r"need \[4, 2\]"),
        (lambda: PLE([expert, lambda: expert(9)], TASKS, [INPUTS, WIDTH]), None, "takes 9 features"),
        (lambda: PLE([expert, expert], TASKS, [INPUTS, 9]), None, "'a' in level 2 of PLE was built for 9 numbers"),
        (lambda: DSelectK(expert, TASKS, gate=9, num_experts=2), None, "'a' in DSelectK was built for 9 numbers"),
        (lambda: MTAN([CONV], TASKS, [5]), MAPS, "Stage 0 of MTAN returned shape .* 2 channels; .* says 5"),
        (lambda: MTAN([CONV, nn.Conv2d(3, 2, 1)], TASKS, [2, 2]), MAPS, "Stage 1 of MTAN failed on an input of shape"),
        (lambda: MTAN([nn.Flatten()], TASKS, [64]), MAPS, r"returned shape \[2, 64\]; it must be \[B, C, H, W\]"),
        (
            lambda: MTAN([(CONV, nn.Conv2d(2, 2, 3))], TASKS, [2]),
            MAPS,
            "let only the first part of a stage change the size",
        ),
        (
            lambda: MTAN([nn.Identity(), nn.Conv1d(6, 3, 1)], TASKS, [8, 8], layout="tokens"),
            torch.zeros(2, 6, 8),
            "their number must stay",
        ),
    ],
)
def test_refused_at_the_first_batch(make: Callable[[], nn.Module], x: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()(torch.zeros(4, INPUTS) if x is None else x)
