"""Each architecture against the papers' formulas in plain tensors, forward and gradient, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl.architectures import CGC, MTAN, PLE, DSelectK, MMoE
from tests.architectures import references
from tests.architectures.models import INPUTS, TASKS, WIDTH, expert, mtan, mtan_of_maps, ple

Reference = Callable[[references.State, Tensor], dict[str, Tensor]]


def assert_equal(trunk: nn.Module, reference: Reference, x: Tensor) -> None:
    """Outputs, and the gradients of a random function of them by every parameter and by the input."""
    trunk.double()
    x = x.double().requires_grad_()
    state = dict(trunk.named_parameters())
    found, expected = trunk(x), reference(state, x)
    assert list(found) == list(expected) == list(TASKS)
    seeds = {task: torch.randn_like(z) for task, z in found.items()}
    inputs = [x, *state.values()]
    gradients = [
        torch.autograd.grad([outputs[task] for task in TASKS], inputs, [seeds[task] for task in TASKS])
        for outputs in (found, expected)
    ]
    for task in TASKS:
        torch.testing.assert_close(found[task], expected[task], rtol=0, atol=1e-10)
    for name, ours, theirs in zip(["x", *state], *gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("stacked", [True, False])
def test_mmoe(stacked: bool) -> None:
    trunk = MMoE(expert, TASKS, INPUTS, num_experts=3) if stacked else MMoE([expert() for _ in range(3)], TASKS, INPUTS)
    assert_equal(trunk, lambda state, x: references.mmoe(state, x, TASKS, 3, stacked=stacked), torch.randn(7, INPUTS))


@pytest.mark.parametrize(("levels", "task_experts", "shared_experts"), [(1, 2, 1), (2, 1, 2), (3, 2, 2)])
def test_ple(levels: int, task_experts: int, shared_experts: int) -> None:
    trunk = ple(levels, task_experts, shared_experts)
    assert_equal(
        trunk,
        lambda state, x: references.ple(state, x, TASKS, levels, task_experts, shared_experts),
        torch.randn(7, INPUTS),
    )


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("num_experts", [4, 5])
def test_dselect_k_and_its_penalties(static: bool, num_experts: int) -> None:
    gamma, entropy = 0.8, 0.3
    trunk = DSelectK(
        expert,
        TASKS,
        num_selected=2,
        gate=None if static else INPUTS,
        num_experts=num_experts,
        gamma=gamma,
        entropy=entropy,
    ).double()
    with torch.no_grad():  # away from the start, beyond the smooth step for some
        for name, parameter in trunk.named_parameters():
            if ".z" in name:
                parameter.normal_(std=0.3)

    def reference(state: references.State, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        return references.dselect_k(state, x, TASKS, num_experts, 2, gamma, static=static)

    x = torch.randn(7, INPUTS, dtype=torch.float64)
    assert_equal(trunk, lambda state, x: reference(state, x)[0], x)
    trunk.penalties()
    trunk(x)
    penalties = trunk.penalties()
    state = dict(trunk.named_parameters())
    _, entropies, reachable = reference(state, x)
    expected = {"gate_entropy": entropy * entropies} | ({"gate_reachable": reachable} if num_experts == 5 else {})
    assert penalties.keys() == expected.keys()
    gates = [parameter for name, parameter in state.items() if ".z" in name]
    for name, value in expected.items():
        torch.testing.assert_close(penalties[name], value, rtol=0, atol=1e-10)
        for ours, theirs in zip(
            torch.autograd.grad(penalties[name], gates, retain_graph=True),
            torch.autograd.grad(value, gates, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
            assert bool(ours.isfinite().all())


def test_mtan_of_maps() -> None:
    assert_equal(mtan_of_maps(), lambda state, x: references.mtan_maps(state, x, TASKS), torch.randn(3, 2, 8, 8))


@pytest.mark.parametrize("shape", [(3, 7), (3,)])
def test_mtan_of_tokens(shape: tuple[int, ...]) -> None:
    assert_equal(mtan(), lambda state, x: references.mtan_tokens(state, x, TASKS), torch.randn(*shape, INPUTS))


def test_ple_with_one_level_is_cgc() -> None:
    torch.manual_seed(1)
    cgc = CGC(expert, TASKS, INPUTS, task_experts=2, shared_experts=3)
    torch.manual_seed(1)
    one_level = PLE([expert], TASKS, [INPUTS], task_experts=2, shared_experts=3)
    one_level.load_state_dict(cgc.state_dict())
    x = torch.randn(4, INPUTS)
    assert all(torch.equal(cgc(x)[task], one_level(x)[task]) for task in TASKS)


@pytest.mark.parametrize("made", [True, False])
def test_mmoe_with_one_expert_is_hard_sharing(made: bool) -> None:
    torch.manual_seed(1)
    trunk = MMoE(expert, TASKS, INPUTS, num_experts=1) if made else MMoE([expert()], TASKS, INPUTS)
    torch.manual_seed(1)
    alone, x = expert(), torch.randn(8, INPUTS)
    for task, z in trunk(x).items():
        torch.testing.assert_close(z, alone(x), rtol=0, atol=1e-7 if made else 0, msg=task)
    assert z.shape == (8, WIDTH)


def test_maps_grow_and_shrink_between_stages() -> None:
    encoder = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(2, 3, 1))
    decoder = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 5, 1))
    trunk = MTAN([encoder, decoder], TASKS, channels=[3, 5])
    assert {z.shape for z in trunk(torch.randn(2, 2, 12, 8)).values()} == {(2, 5, 6, 4)}
