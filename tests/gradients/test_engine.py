"""One step of a real Trainer against per-task autograd on the uncut graph, for random models."""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mtl import Weighting
from tests.gradients.oracle import (
    Gradients,
    assert_same,
    expected_update,
    feature_gradients,
    penalty_gradients,
    rows_at,
    task_gradients,
)
from tests.models import KINDS, Case, build
from tests.thinning import thinned
from tests.training import Steps, fit, flat_parameters, loader
from tests.weightings import Fixed, WeightedSum, fixed

PLACES = ("losses", "trunk", "features", "last_layer")
# (number of tasks, whether weights scale the heads, what is measured), each with a random model of its own.
SETTINGS = ((1, True, "gramian"), (2, False, "gramian"), (4, True, "norms"), (5, False, "norms"))
# Inputs of each task's own have no features in common.
REFUSED = [("loaders", "features")]
# Where these kinds of trunk have the layer that runs last; of branches it is that of the last task.
LAST = {"mlp": "2", "conv": "2", "dict": "second", "partial": "second", "checkpointed": "layers.2", "keywords": "layer"}


def weights_for(case: Case, seed: int) -> dict[str, float]:
    """Weights that are told apart, a negative one and a zero among them."""
    generator = random.Random(seed)
    choices = [generator.uniform(0.1, 3.0) for _ in case.tasks]
    if len(choices) > 2:
        choices[0], choices[-1] = 0.0, -0.7
    return dict(zip(case.tasks, choices, strict=True))


def one_step(case: Case, weighting: Weighting | None) -> tuple[Steps, Tensor]:
    """Fit one batch; return what was seen and by how much descent with step size 1 moved the parameters."""
    before, steps = flat_parameters(case.module), Steps()
    callbacks: list[Any] = [steps] if weighting is None else [steps, weighting]
    fit(case.module, loader(case.batch), callbacks=callbacks)
    return steps, before - flat_parameters(case.module)


def flat(case: Case, gradients: Gradients) -> Tensor:
    pieces = []
    for name, parameter in case.module.named_parameters():
        gradient = gradients[name]
        pieces.append((torch.zeros_like(parameter) if gradient is None else gradient).flatten())
    return torch.cat(pieces)


def rows_of(case: Case, place: str) -> Tensor:
    """What a method must find at this place, ``[K, n]``."""
    if place == "features":
        return torch.stack(list(feature_gradients(case.module, case.batch).values()))
    shared = [p for p in case.module.shared_parameters() if p.requires_grad]
    return rows_at(case.module, task_gradients(case.module, case.batch), shared)


@pytest.mark.parametrize(("num_tasks", "weighs_heads", "measures"), thinned(SETTINGS[::-1]))
@pytest.mark.parametrize(("kind", "place"), [case for case in product(KINDS, PLACES) if case not in REFUSED])
def test_every_parameter_gets_its_weighted_sum(
    kind: str, place: str, num_tasks: int, weighs_heads: bool, measures: str
) -> None:
    if place == "losses":
        weighs_heads, measures = True, "losses"
    seed = 100 * KINDS.index(kind) + num_tasks
    case = build(kind, num_tasks, seed)
    weights, gradients = weights_for(case, seed), task_gradients(case.module, case.batch)
    penalty = penalty_gradients(case.module, case.batch)
    rows = rows_of(case, place)
    expected = expected_update(case.module, gradients, weights, penalty, weighs_heads=weighs_heads)

    weighting = fixed(weights, measures, weighs_heads=weighs_heads, at="trunk" if place == "losses" else place)
    steps, moved = one_step(case, weighting)

    assert_same(steps.gradients[0], expected)
    torch.testing.assert_close(moved, flat(case, expected), rtol=1e-9, atol=1e-9)
    losses = torch.stack([output.loss.detach() for output in case.module.present_outputs(case.batch).values()])
    assert weighting.asked[0].tasks == tuple(case.tasks)
    assert losses.shape == weighting.asked[0].losses.shape
    if place in ("trunk", "features"):
        assert_measured(weighting, rows, measures)
    elif place == "losses":
        assert weighting.asked[0].norms is weighting.asked[0].gramian is None


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", [*LAST, "per task"])
def test_measured_at_a_layer(kind: str, by_name: bool) -> None:
    for num_tasks, _, measures in SETTINGS:
        case = build(kind, num_tasks, seed=num_tasks)
        # Where heads read features of their own, each task's last layer counts.
        layers = [LAST[kind]] if kind in LAST else [f"branches.{task}" for task in range(num_tasks)]
        parameters = [p for layer in layers for p in case.module.trunk.get_submodule(layer).parameters()]
        rows = rows_at(case.module, task_gradients(case.module, case.batch), parameters)
        at: Any = [f"trunk.{layer}" for layer in layers] if by_name else "last_layer"
        weighting = fixed(weights_for(case, num_tasks), measures, at=at)
        one_step(case, weighting)
        assert_measured(weighting, rows, measures)


def test_measured_at_several_named_modules() -> None:
    case = build("mlp", 3, seed=3)
    rows = rows_of(case, "trunk")
    weighting = fixed(weights_for(case, 3), "gramian", at=("trunk.0", "trunk.2"))
    one_step(case, weighting)
    assert_measured(weighting, rows, "gramian")


@pytest.mark.parametrize(
    ("kind", "place"), [case for case in product(KINDS, ["trunk", "features"]) if case not in REFUSED]
)
def test_an_aggregator_sees_the_rows_and_its_direction_is_applied(kind: str, place: Any) -> None:
    if kind == "tied":
        place = "trunk"
    num_tasks = 1 + KINDS.index(kind) % 4
    case = build(kind, num_tasks, seed=17)
    weights, gradients, rows = weights_for(case, 17), task_gradients(case.module, case.batch), rows_of(case, place)
    penalty = penalty_gradients(case.module, case.batch)
    expected = expected_update(case.module, gradients, weights, penalty, weighs_heads=False)
    aggregator = WeightedSum(weights, at=place)
    steps, _ = one_step(case, aggregator)
    torch.testing.assert_close(aggregator.rows[0], rows, rtol=1e-10, atol=1e-10)
    assert_same(steps.gradients[0], expected)
    assert steps.weights == [None]


def test_without_a_weighting_the_sum_of_all_losses_is_descended() -> None:
    case = build("penalized", 3, seed=2)
    equal = dict.fromkeys(case.tasks, 1.0)
    penalty = penalty_gradients(case.module, case.batch)
    expected = expected_update(case.module, task_gradients(case.module, case.batch), equal, penalty, weighs_heads=True)
    steps, _ = one_step(case, None)
    assert_same(steps.gradients[0], expected)


def test_a_narrower_choice_of_shared_parameters() -> None:
    case = build("mlp", 3, seed=5)
    second = list(case.module.trunk.get_submodule("2").parameters())
    case.module.shared_parameters = lambda: second  # type: ignore[method-assign]
    weights, gradients, rows = weights_for(case, 5), task_gradients(case.module, case.batch), rows_of(case, "trunk")
    # The trunk's first layer then counts as the heads do.
    expected = expected_update(case.module, gradients, weights, {}, weighs_heads=False)
    weighting = fixed(weights, "gramian", weighs_heads=False)
    steps, _ = one_step(case, weighting)
    assert rows.shape[1] == sum(p.numel() for p in second)
    assert_measured(weighting, rows, "gramian")
    assert_same(steps.gradients[0], expected)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


@pytest.mark.parametrize("aggregate", [False, True])
def test_a_trunk_of_two_dtypes(aggregate: bool) -> None:
    case = build("mlp", 3, seed=7)
    # float64 below, float32 above: two matrices of rows that make up one Jacobian.
    layers = nn.Linear(4, 5).double(), Cast(torch.float32), nn.Linear(5, 5), Cast(torch.float64)
    case.module.trunk = nn.Sequential(*layers)
    weights, gradients = weights_for(case, 7), task_gradients(case.module, case.batch)
    rows = rows_of(case, "trunk")
    expected = expected_update(case.module, gradients, weights, {}, weighs_heads=False)
    weighting = WeightedSum(weights) if aggregate else fixed(weights, "gramian", weighs_heads=False)
    steps, _ = one_step(case, weighting)
    assert_same(steps.gradients[0], expected, tolerance=1e-5)
    if isinstance(weighting, Fixed):
        assert_measured(weighting, rows, "gramian", tolerance=1e-5)
    else:
        torch.testing.assert_close(weighting.rows[0].norm(dim=1), rows.norm(dim=1), rtol=1e-5, atol=1e-6)


def assert_measured(weighting: Fixed, rows: Tensor, measures: str, tolerance: float = 1e-9) -> None:
    signals = weighting.asked[0]
    assert signals.norms is not None
    torch.testing.assert_close(signals.norms.double(), rows.norm(dim=1), rtol=tolerance, atol=tolerance)
    if measures == "gramian":
        assert signals.gramian is not None
        assert signals.gramian.dtype == torch.float64
        torch.testing.assert_close(signals.gramian, rows @ rows.T, rtol=tolerance, atol=tolerance)
    else:
        assert signals.gramian is None
