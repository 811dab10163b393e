"""Methods that change gradients one by one, in an order or by a sign that chance decides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_mtl.weighting import GradDrop, GradVac, PCGrad
from lightning_mtl.weighting.graddrop import graddrop
from lightning_mtl.weighting.gradvac import gradvac_weights
from lightning_mtl.weighting.pcgrad import pcgrad_weights, random_orders
from lightning_mtl.weighting.upgrad import upgrad_weights
from tests.contract import J1, J2, ask, course, direction_of, signals
from tests.small import batches, small
from tests.training import fit, flat_parameters, loader


def jacobian(num_tasks: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.randn(num_tasks, 1, generator=generator, dtype=torch.float64)
    return scales * torch.randn(num_tasks, num_tasks + 2, generator=generator, dtype=torch.float64)


def slow_pcgrad(rows: Tensor, orders: Tensor) -> Tensor:
    """Algorithm 1 of the paper on the gradients themselves."""
    changed = rows.clone()
    for i, order in enumerate(orders.tolist()):
        for j in order:
            product = changed[i] @ rows[j]
            if product < 0:
                changed[i] -= product / (rows[j] @ rows[j]) * rows[j]
    return changed


def slow_gradvac(rows: Tensor, targets: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
    changed, cosines = rows.clone(), torch.eye(len(rows), dtype=rows.dtype)
    for i, order in enumerate(orders.tolist()):
        for j in order:
            phi, goal = torch.cosine_similarity(changed[i], rows[j], dim=0), targets[i, j]
            cosines[i, j] = phi
            if phi < goal:
                up = changed[i].norm() * (goal * (1 - phi**2).sqrt() - phi * (1 - goal**2).sqrt())
                changed[i] += up / (rows[j].norm() * (1 - goal**2).sqrt()) * rows[j]
    return changed, cosines


@pytest.mark.parametrize(
    ("rows", "orders", "expected"),
    [
        (J1, [[1], [0]], [0.5847953216374266, 3.801169590643275, 3.801169590643275]),
        (J2, [[1, 2], [0, 2], [0, 1]], [-0.8932079708111142, 1.9964075217513333, 5.792899242211619]),
        (J2, [[2, 1], [2, 0], [1, 0]], [-0.8932079708111142, 1.9964075217513333, 5.792899242211619]),
    ],
)
def test_pcgrad_golden(rows: Any, orders: list[list[int]], expected: list[float]) -> None:
    J = torch.tensor(rows, dtype=torch.float64)
    direction = pcgrad_weights(J @ J.T, torch.tensor(orders)) @ J
    torch.testing.assert_close(direction, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(num_tasks=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_the_gramian_is_all_that_pcgrad_needs(num_tasks: int, seed: int) -> None:
    rows = jacobian(num_tasks, seed)
    orders = random_orders(num_tasks, torch.Generator().manual_seed(seed))
    expected = slow_pcgrad(rows, orders).sum(0)
    torch.testing.assert_close(pcgrad_weights(rows @ rows.T, orders) @ rows, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(num_tasks=st.integers(1, 9), seed=st.integers(0, 10_000))
def test_the_gramian_is_all_that_gradvac_needs(num_tasks: int, seed: int) -> None:
    rows = jacobian(num_tasks, seed)
    generator = torch.Generator().manual_seed(seed)
    orders = random_orders(num_tasks, generator)
    targets = 1.6 * torch.rand(num_tasks, num_tasks, generator=generator, dtype=torch.float64) - 0.8
    changed, expected = slow_gradvac(rows, targets, orders)
    weights, cosines = gradvac_weights(rows @ rows.T, targets, orders)
    scale = float(changed.abs().max())
    torch.testing.assert_close(weights @ rows / scale, changed.sum(0) / scale, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(cosines, expected, rtol=1e-6, atol=1e-6)


def test_pcgrad_of_two_tasks_is_upgrad_with_preference_1() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    for seed in range(50):
        rows = jacobian(2, seed)
        gramian = rows @ rows.T
        torch.testing.assert_close(pcgrad_weights(gramian, torch.tensor([[1], [0]])), upgrad_weights(gramian, ones))


def test_pcgrad_without_a_conflict_is_the_sum() -> None:
    rows = jacobian(5).abs()
    orders = random_orders(5, torch.Generator())
    assert pcgrad_weights(rows @ rows.T, orders).tolist() == [1.0] * 5


def test_gradvac_begins_as_pcgrad() -> None:
    rows, orders = jacobian(6), random_orders(6, torch.Generator())
    weights, _ = gradvac_weights(rows @ rows.T, torch.zeros(6, 6), orders)
    torch.testing.assert_close(weights, pcgrad_weights(rows @ rows.T, orders))


def test_gradvac_reaches_the_target_of_two_tasks() -> None:
    rows = jacobian(2, 3)
    targets = torch.full((2, 2), 0.7, dtype=torch.float64)
    changed, _ = slow_gradvac(rows, targets, torch.tensor([[1], [0]]))
    assert float(torch.cosine_similarity(rows[0], rows[1], dim=0)) < 0.7
    for i in (0, 1):
        torch.testing.assert_close(float(torch.cosine_similarity(changed[i], rows[1 - i], dim=0)), 0.7)


def test_gradvacs_targets_follow_the_cosines() -> None:
    weighting = GradVac(beta=0.25)
    weighting.reset(["a", "b"])
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    for step in range(3):
        ask(weighting, signals(torch.ones(2), rows, step=step))
    wanted = 0.6 * (1 - 0.75**3)
    assert weighting.targets[0, 1].item() == pytest.approx(wanted)
    assert weighting.targets[1, 0].item() == pytest.approx(wanted)


def test_a_pairs_target_stays_while_one_of_it_is_absent() -> None:
    weighting = GradVac(beta=0.5)
    weighting.reset(["a", "b", "c"])
    ask(weighting, course(3)[0])
    before = weighting.targets.clone()
    rows = jacobian(2, 1)
    ask(weighting, signals(torch.ones(2), rows, step=1, tasks=["a", "c"]))
    changed = weighting.targets != before
    # The diagonal follows a cosine of 1, and nobody reads it.
    assert changed.tolist() == [[True, False, True], [False, False, False], [True, False, True]]
    assert weighting.targets.shape == (3, 3)


def test_gradients_that_were_parallel_for_long_do_not_blow_up() -> None:
    weighting = GradVac(beta=1.0)
    weighting.reset(["a", "b"])
    ask(weighting, signals(torch.ones(2), torch.ones(2, 3, dtype=torch.float64)))
    weights = ask(weighting, signals(torch.ones(2), torch.eye(2, dtype=torch.float64), step=1))
    assert weights.isfinite().all()
    assert weights.max() < 1e4


@pytest.mark.parametrize("cls", [PCGrad, GradVac])
def test_no_measurement_no_change_but_of_the_order(cls: Any) -> None:
    weighting = cls(every_n_steps=3)
    weighting.reset(["a", "b", "c"])
    random = weighting.random.clone()
    for step in course(3, steps=3):
        ask(weighting, step)
        assert not torch.equal(weighting.random, random)
        random = weighting.random.clone()


def test_gradvacs_targets_rest_between_measurements() -> None:
    weighting = GradVac(beta=0.5, every_n_steps=2)
    weighting.reset(["a", "b", "c"])
    measured, unmeasured = course(3, steps=2)
    ask(weighting, measured)
    targets = weighting.targets.clone()
    assert targets.any()
    ask(weighting, unmeasured)
    assert torch.equal(weighting.targets, targets)


def test_orders_are_drawn_anew_for_each_task_and_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_orders(3, generator) for _ in range(600)])
    for task in range(3):
        assert set(drawn[:, task].flatten().tolist()) == {0, 1, 2} - {task}
        first = float((drawn[:, task, 0] == (task + 1) % 3).float().mean())
        assert first == pytest.approx(0.5, abs=0.08)
    assert random_orders(1, generator).shape == (1, 0)


def test_graddrop_keeps_what_all_agree_on() -> None:
    rows = torch.tensor([[1.0, -1.0, 0.0], [2.0, -3.0, 0.0]])
    for draw in (0.0, 0.3, 0.999):
        assert graddrop(rows, torch.zeros(2), torch.full((3,), draw)).tolist() == [3.0, -4.0, 0.0]


def test_graddrop_chooses_a_sign_by_its_share() -> None:
    aggregator = GradDrop()
    aggregator.reset(["a", "b", "c"])
    rows = torch.tensor([[1.0], [2.0], [-1.0]]).expand(3, 20_000).contiguous()
    direction = aggregator.combine(course(3)[0], rows)
    assert set(direction.tolist()) == {3.0, -1.0}
    assert float((direction == 3.0).float().mean()) == pytest.approx(0.75, abs=0.02)
    assert float(direction.mean()) == pytest.approx(2.0, abs=0.08)


def test_graddrop_draws_once_a_step_and_anew_in_the_next() -> None:
    aggregator, given = GradDrop(), signals(torch.ones(2))
    aggregator.reset(["a", "b"])
    rows = torch.stack([torch.ones(64), -torch.ones(64)])
    first = direction_of(aggregator, given, rows)
    assert torch.equal(direction_of(aggregator, given, rows), first)
    aggregator.observe(given, [0, 1])
    assert not torch.equal(direction_of(aggregator, given, rows), first)


def test_graddrops_leak() -> None:
    rows, uniform = torch.randn(3, 40), torch.rand(40)
    torch.testing.assert_close(graddrop(rows, torch.ones(3), uniform), rows.sum(0))
    leak = torch.tensor([0.0, 0.5, 1.0])
    purity = 0.5 * (1 + rows.sum(0) / rows.abs().sum(0))
    mask = ((purity > uniform) & (rows > 0)) | ((purity < uniform) & (rows < 0))
    expected = ((leak[:, None] + (1 - leak[:, None]) * mask) * rows).sum(0)
    torch.testing.assert_close(graddrop(rows, leak, uniform), expected)
    aggregator = GradDrop(leak={"c": 1.0, "b": 0.5})
    aggregator.reset(["a", "b", "c"])
    given = course(3)[0]
    drawn = torch.rand(40, generator=aggregator.random_numbers("random"))
    torch.testing.assert_close(aggregator.combine(given, rows), graddrop(rows, leak, drawn))


@pytest.mark.parametrize("place", ["trunk", "features"])
def test_graddrop_in_a_fit(place: Any) -> None:
    found = []
    for seed in (0, 0, 1):
        module = small(("a", "b", "c"))
        fit(module, loader(*batches(4, 4)), callbacks=[GradDrop(seed=seed, at=place)])
        found.append(flat_parameters(module))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_graddrop_at_the_features_of_several_processes_is_refused() -> None:
    several: Any = SimpleNamespace(trainer=SimpleNamespace(world_size=2))
    GradDrop().check(several)
    with pytest.raises(ValueError, match=r"GradDrop\(at='features'\) draws .* use at='trunk' on several processes"):
        GradDrop(at="features").check(several)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradDrop(1.5), r"GradDrop\(leak=1.5\) must be at least 0 and at most 1"),
        (lambda: GradDrop({"a": -0.5}), r"GradDrop\(leak={'a': -0.5}\) must be"),
        (lambda: GradVac(2.0), r"GradVac\(beta=2.0\) must be at least 0 and at most 1"),
    ],
)
def test_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
