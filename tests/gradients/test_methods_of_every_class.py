"""Some situations under every class of weighting: what it measures, which rule its heads follow, aggregators."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl.weighting import MGDA, CAGrad, GradDrop, GradNorm, PCGrad, StaticWeights, UncertaintyWeighting
from tests.gradients.checks import HARMLESS, Close, check_gradients, first_step, parameters_of
from tests.gradients.methods import (
    Agreeing,
    FromGramian,
    FromLossesSharedOnly,
    FromNormsSharedOnly,
    Method,
    OwnHeads,
    Summed,
    agreeing,
)
from tests.gradients.per_task import PerTask, dense, per_task
from tests.gradients.situations import BY_NAME
from tests.gradients.situations.base import Situation
from tests.gradients.test_situations import check_step

pytestmark = [pytest.mark.filterwarnings(ignored) for ignored in HARMLESS]

NAMES = (
    "plain",
    "trunk applied three times",
    "tasks read different depths",
    "first derivative",
    "divergence in both tasks",
    "frozen dataclass",
    "both heads add_",
    "tied weight in both heads",
    "cascade",
    "probe",
    "constant loss",
    "complex layer and features",
    "one task absent",
)
CHOSEN = [pytest.param(BY_NAME[name], id=name) for name in NAMES]
CLEAN = [pytest.param(BY_NAME[name], id=name) for name in NAMES if BY_NAME[name].clean]
# Signs need real numbers.
REAL = [pytest.param(BY_NAME[name], id=name) for name in NAMES if not name.startswith("complex")]
METHODS: dict[str, tuple[str, Any]] = {
    "losses, heads by 1": ("losses", FromLossesSharedOnly),
    **{
        f"{make.__name__} at {place}": (place, functools.partial(make, at=place))
        for make, places in (
            (FromNormsSharedOnly, ("trunk", "features")),
            (FromGramian, ("features", "last_layer")),
            (OwnHeads, ("trunk", "features", "last_layer")),
        )
        for place in places
    },
    "static": ("losses", functools.partial(StaticWeights, weights={"a": 0.3, "b": 2.0})),
    "uncertainty": ("losses", UncertaintyWeighting),
    "MGDA": ("trunk", MGDA),
    "MGDA at features": ("features", functools.partial(MGDA, at="features")),
    "CAGrad": ("trunk", CAGrad),
    "PCGrad at last_layer": ("last_layer", functools.partial(PCGrad, at="last_layer")),
    "GradNorm": ("last_layer", GradNorm),
    "importance": ("trunk", functools.partial(FromGramian, importance={"a": 0.2})),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("situation", CHOSEN)
def test_every_class_of_weighting(situation: Situation, method: str) -> None:
    place, make = METHODS[method]
    weighting = make()
    watch = first_step(situation, place, weighting)
    assert watch is not None, "nothing is impossible here"
    check_step(situation, place, Method(make), weighting, watch)


@pytest.mark.parametrize("situation", CHOSEN)
def test_without_a_weighting(situation: Situation) -> None:
    watch = first_step(situation, "losses", None)
    assert watch is not None
    expected = per_task(situation)
    ones = dict.fromkeys(expected.tasks, 1.0)
    check_gradients(watch.gradients[0], expected.weighted(ones, ones), situation.tolerance)


@pytest.mark.parametrize("situation", CHOSEN)
def test_an_aggregator_that_is_linear(situation: Situation) -> None:
    check_linear(situation, Summed())


@pytest.mark.parametrize("situation", CLEAN)
def test_an_aggregator_that_is_linear_at_the_features(situation: Situation) -> None:
    check_linear(situation, Summed(at="features"))


def check_linear(situation: Situation, aggregator: Summed) -> None:
    watch = first_step(situation, "trunk", aggregator)
    assert watch is not None
    assert watch.weights[0] is None
    expected = per_task(situation)
    given = zip(expected.tasks, Summed.factors, strict=False)
    factors = {task: factor * aggregator.importance.get(task, 1.0) for task, factor in given}
    ones = dict.fromkeys(factors, 1.0)
    check_gradients(watch.gradients[0], expected.weighted(factors, ones), situation.tolerance)


@pytest.mark.parametrize("situation", REAL)
def test_an_aggregator_that_is_not_linear(situation: Situation) -> None:
    watch = first_step(situation, "trunk", Agreeing())
    assert watch is not None
    expected = per_task(situation)
    ones = dict.fromkeys(expected.tasks, 1.0)
    gradients = expected.weighted(ones, ones)
    for name in expected.shared:
        if (rows := rows_of(expected, name, parameters_of(watch.module)[name])) is not None:
            penalty = expected.penalty[name]
            gradients[name] = agreeing(rows) if penalty is None else agreeing(rows) + penalty
    check_gradients(watch.gradients[0], gradients, situation.tolerance)


@pytest.mark.parametrize("situation", REAL)
def test_gradient_sign_dropout(situation: Situation) -> None:
    """Each element is the sum of the positive or of the negative ones, whichever the method draws."""
    watch = first_step(situation, "trunk", GradDrop())
    assert watch is not None
    expected = per_task(situation)
    ones = dict.fromkeys(expected.tasks, 1.0)
    heads = expected.weighted(ones, ones)
    for name in expected.shared:
        rows = rows_of(expected, name, parameters_of(watch.module)[name])
        found = watch.gradients[0][name]
        if rows is None:
            continue
        assert found is not None
        penalty = expected.penalty[name]
        chosen = dense(found) if penalty is None else dense(found) - penalty
        positive, negative = rows.clamp(min=0).sum(0), rows.clamp(max=0).sum(0)
        nearest = torch.where((chosen - positive).abs() < (chosen - negative).abs(), positive, negative)
        Close(situation.tolerance).check(chosen, nearest, name)
        heads[name] = dense(found)
    check_gradients(watch.gradients[0], heads, situation.tolerance)


def rows_of(expected: PerTask, name: str, like: Tensor) -> Tensor | None:
    """All tasks' gradients of one parameter, zero where a task does not reach it; None where no task does."""
    found = [own[name] for own in expected.tasks.values()]
    if all(gradient is None for gradient in found):
        return None
    return torch.stack([torch.zeros_like(like) if gradient is None else gradient for gradient in found])
