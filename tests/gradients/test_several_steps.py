"""Situations over several micro-batches and steps, in automatic optimization, with learning rates of the tasks' own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl import MultiTaskModule, Weighting
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from tests.gradients.checks import HARMLESS, Close, Watch, check_gradients, first_step, parameters_of, train
from tests.gradients.methods import FromGramianSharedOnly, FromLosses, FromNorms, Method, OwnHeads
from tests.gradients.per_task import Gradients, per_task
from tests.gradients.situations import BY_NAME
from tests.gradients.situations.base import Situation

pytestmark = [pytest.mark.filterwarnings(ignored) for ignored in HARMLESS]

NAMES = (
    "plain",
    "trunk applied three times",
    "first derivative",
    "gradient penalty in penalties()",
    "divergence in both tasks",
    "tied weight in one head",
    "both heads add_",
    "probe",
    "part of the trunk called, and the whole",
)
CHOSEN = [pytest.param(BY_NAME[name], id=name) for name in NAMES]
METHODS = {"trunk": FromGramianSharedOnly, "features": FromNorms, "last_layer": OwnHeads}
EVERYWHERE = pytest.mark.parametrize("place", ["losses", "trunk", "features", "last_layer"])
SHARES = {"a": 2.0, "b": 0.5}


def method_at(situation: Situation, place: str, **arguments: Any) -> Weighting:
    if place == "losses":
        return FromLosses(**arguments)
    make: Callable[..., Weighting] = METHODS[place]
    return make(at=situation.at(place), **arguments)


def expected_in(situation: Situation, seed: int, weighting: Weighting, weights: dict[str, float]) -> Gradients:
    """The gradients of one batch under the weights that were logged."""
    heads = Method(type(weighting)).heads(weighting, weights)
    return per_task(situation, seed).weighted(weights, heads)


@EVERYWHERE
@pytest.mark.parametrize("situation", CHOSEN)
def test_weights_are_held_between_measurements(situation: Situation, place: str) -> None:
    weighting = method_at(situation, place, every_n_steps=2)
    watch = train(situation.build(), [situation.inputs(seed) for seed in (0, 1, 2)], weighting)
    first, held, measured = (watch.weights_of(step) for step in (0, 1, 2))
    # Where a task had no gradient its weight was 0; until the next look, when it may have one, it has the others' mean.
    others = [weight for weight in first.values() if weight != 0]
    kept = {task: weight if weight != 0 else sum(others) / len(others) for task, weight in first.items()}
    # The state that holds them is float32.
    assert held == pytest.approx(kept, rel=1e-6)
    assert measured != pytest.approx(first, rel=1e-6)
    for step, weights in enumerate((first, held, measured)):
        expected = expected_in(situation, step, weighting, weights)
        check_gradients(watch.gradients[step], expected, situation.tolerance)


@EVERYWHERE
@pytest.mark.parametrize("situation", CHOSEN)
def test_two_micro_batches(situation: Situation, place: str) -> None:
    weighting = method_at(situation, place)
    module = situation.build(accumulate_grad_batches=2)
    watch = train(module, [situation.inputs(0), situation.inputs(1)], weighting)
    assert len(watch.gradients) == 1
    weights = watch.weights_of(0)
    halves = [expected_in(situation, seed, weighting, weights) for seed in (0, 1)]
    check_gradients(watch.gradients[0], mean(*halves), situation.tolerance)
    if place == "trunk":
        rows = [per_task(situation, seed).rows(per_task(situation).shared, parameters_of(module)) for seed in (0, 1)]
        whole = torch.stack(rows).mean(0)
        gramian = watch.signals[0].gramian
        assert gramian is not None
        Close(10 * situation.tolerance).check(gramian, whole @ whole.T, "gramian")


def mean(first: Gradients, second: Gradients) -> Gradients:
    result: Gradients = {}
    for name, gradient in first.items():
        found = [g for g in (gradient, second[name]) if g is not None]
        result[name] = torch.stack(found).sum(0) / 2 if found else None
    return result


@EVERYWHERE
@pytest.mark.parametrize("situation", CHOSEN)
def test_automatic_optimization(situation: Situation, place: str) -> None:
    weighting = method_at(situation, place)
    module = situation.build()
    module.automatic_optimization = True
    try:
        watch = train(module, [situation.inputs(0)], weighting)
    except ValueError as error:
        # Lightning passes backward once: where gradients are written instead, the setup is refused.
        if place != "trunk" or "automatic" not in str(error):
            raise
        return
    expected = expected_in(situation, 0, weighting, watch.weights_of(0))
    check_gradients(watch.gradients[0], expected, situation.tolerance)


@EVERYWHERE
@pytest.mark.parametrize("situation", CHOSEN)
def test_shares_of_the_trunk(situation: Situation, place: str) -> None:
    """A multiplier of a task's learning rate acts on its weight in the shared gradient, and there alone."""
    weighting = method_at(situation, place)
    rates = TaskLearningRate(Importance(SHARES), shares_trunk=True)
    watch = train(situation.build(), [situation.inputs(0)], weighting, rates)
    weights = watch.weights_of(0)
    without = {task: weight / SHARES[task] for task, weight in weights.items()}
    heads = Method(type(weighting)).heads(weighting, without)
    expected = per_task(situation).weighted(weights, heads)
    check_gradients(watch.gradients[0], expected, situation.tolerance)


class Counting:
    """Counts how often each parameter's hooks are called, and keeps what they were given."""

    def __init__(self, module: MultiTaskModule) -> None:
        self.given: dict[str, list[Tensor]] = {name: [] for name, _ in module.named_parameters()}
        self.accumulated: dict[str, list[Tensor]] = {name: [] for name, _ in module.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.register_hook(functools.partial(self.keep, name))
            parameter.register_post_accumulate_grad_hook(functools.partial(self.keep_accumulated, name))

    def keep(self, name: str, gradient: Tensor) -> None:
        self.given[name].append(gradient.clone())

    def keep_accumulated(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.accumulated[name].append(parameter.grad.clone())


@EVERYWHERE
@pytest.mark.parametrize("situation", CHOSEN)
def test_hooks_of_parameters_are_called_once_with_the_final_gradient(situation: Situation, place: str) -> None:
    weighting = method_at(situation, place)
    counting: list[Counting] = []

    class Hooking(Watch):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            counting.append(Counting(pl_module))

    watch = train(situation.build(), [situation.inputs(0)], weighting, watch=Hooking())
    expected = expected_in(situation, 0, weighting, watch.weights_of(0))
    for name, gradient in expected.items():
        for kind, calls in (("gradient", counting[0].given[name]), ("accumulation", counting[0].accumulated[name])):
            wanted = 0 if gradient is None else 1
            assert len(calls) == wanted, f"the {kind} hook of {name} was called {len(calls)} times, not {wanted}"
            if gradient is not None:
                Close(situation.tolerance).check(calls[0], gradient, name)


SPARSE = [name for name in BY_NAME if name.startswith("sparse")]


@pytest.mark.parametrize("place", ["losses", "trunk", "features", "last_layer"])
@pytest.mark.parametrize("name", SPARSE)
def test_clipping_sparse_gradients(name: str, place: str) -> None:
    """The step is that of plain descent along the gradient, clipped to a norm over sparse and dense parts."""
    situation, norm = BY_NAME[name], 0.05
    before = parameters_of(situation.build())
    weighting = method_at(situation, place)
    watch = first_step(situation, place, weighting, gradient_clip_val=norm, lr=1.0)
    assert watch is not None
    expected = expected_in(situation, 0, weighting, watch.weights_of(0))
    whole = torch.stack([gradient.norm() for gradient in expected.values() if gradient is not None]).norm()
    factor = min(1.0, norm / (float(whole) + 1e-6))
    assert factor < 1
    for parameter, after in parameters_of(watch.module).items():
        gradient = expected[parameter]
        step = torch.zeros_like(after) if gradient is None else factor * gradient
        Close(1e-11).check(before[parameter] - after, step, parameter)


@pytest.mark.filterwarnings("ignore:Step 0 is skipped")
@pytest.mark.parametrize("place", ["losses", "trunk", "features", "last_layer"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients_that_are_not_finite_skip_the_step(name: str, place: str) -> None:
    situation = BY_NAME[name]
    before = parameters_of(situation.build())
    module = situation.build(lr=1.0)
    broken = situation.inputs(0)
    broken[0, 0] = torch.inf  # a label of task a; the embeddings clamp it
    watch = train(module, [broken], method_at(situation, place))
    assert watch.batches == 1
    for parameter, after in parameters_of(module).items():
        Close(0).check(after, before[parameter], parameter)
