"""What every weighting can do: importance, a later start, measuring now and then, and state that is declared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl import Signals, Weighting
from lightning_mtl.weighting import GradNorm, UncertaintyWeighting
from tests.gradients.oracle import assert_same, expected_update, task_gradients
from tests.small import TASKS, batch, batches, small
from tests.training import Steps, fit, loader
from tests.weightings import WeightedSum, fixed

WEIGHTS = {"a": 0.5, "b": 2.0}
PLACES = ("losses", "trunk", "features", "last_layer")


def at(place: str, **arguments: Any) -> Any:
    measures = "losses" if place == "losses" else "gramian"
    return fixed(WEIGHTS, measures, at="trunk" if place == "losses" else place, **arguments)


@pytest.mark.parametrize("weighs_heads", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_importance_is_multiplied_in(place: str, weighs_heads: bool) -> None:
    weighs_heads = weighs_heads or place == "losses"
    module, given, steps = small(), batch(), Steps()
    weights = {"a": 0.5, "b": 6.0}
    expected = expected_update(module, task_gradients(module, given), weights, {}, weighs_heads=weighs_heads)
    fit(module, loader(given), callbacks=[at(place, importance={"b": 3.0}, weighs_heads=weighs_heads), steps])
    assert steps.weights[0] is not None
    assert steps.weights[0].tolist() == [0.5, 6.0]
    assert_same(steps.gradients[0], expected, tolerance=1e-5)


def test_importance_multiplies_an_aggregators_rows() -> None:
    module, given, steps = small(), batch(), Steps()
    expected = expected_update(module, task_gradients(module, given), {"a": 1.0, "b": 6.0}, {}, weighs_heads=False)
    aggregator = WeightedSum({"a": 2.0, "b": 2.0}, importance={"a": 0.5, "b": 3.0})
    fit(module, loader(given), callbacks=[aggregator, steps])
    assert_same(steps.gradients[0], expected, tolerance=1e-5)


@pytest.mark.parametrize("weighs_heads", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_equal_weights_before_the_start(place: str, weighs_heads: bool) -> None:
    module, given, steps = small(), batch(), Steps()
    expected = expected_update(module, task_gradients(module, given), {"a": 1.0, "b": 1.0}, {}, weighs_heads=True)
    weighting = at(place, start_step=2, weighs_heads=weighs_heads)
    fit(module, loader(*[given] * 4), callbacks=[weighting, steps])
    assert_same(steps.gradients[0], expected, tolerance=1e-5)
    assert [weights.tolist() for weights in steps.weights if weights is not None] == [[1.0, 1.0]] * 2 + [[0.5, 2.0]] * 2
    assert [signals.step for signals in weighting.asked] == [2, 3]
    assert [signals.step for signals in weighting.observed] == [2, 3]
    assert [signals.norms is None for signals in steps.signals] == [place == "losses" or step < 2 for step in range(4)]


def test_an_aggregator_starts_later() -> None:
    module, given, steps = small(), batch(), Steps()
    expected = expected_update(module, task_gradients(module, given), {"a": 1.0, "b": 1.0}, {}, weighs_heads=True)
    aggregator = WeightedSum(WEIGHTS, start_step=1)
    fit(module, loader(given, given), callbacks=[aggregator, steps])
    assert_same(steps.gradients[0], expected, tolerance=1e-5)
    assert len(aggregator.rows) == 1


@pytest.mark.parametrize("start_step", [0, 1])
def test_the_first_step_of_the_method_is_the_first_of_its_losses(start_step: int) -> None:
    steps, weighting = Steps(), GradNorm(start_step=start_step)
    fit(small(), loader(*batches(4, 4, 4)), callbacks=[weighting, steps])
    assert torch.equal(weighting.first_losses, steps.signals[start_step].losses)


@pytest.mark.parametrize("weighs_heads", [True, False])
@pytest.mark.parametrize("place", ["trunk", "features", "last_layer"])
def test_between_measurements_the_last_weights_serve(place: str, weighs_heads: bool) -> None:
    class Counting(Weighting):
        """Another pair of weights at every call."""

        measures = "norms"

        def weigh(self, signals: Signals) -> Tensor:
            return torch.tensor([1.0, 2.0]) + signals.step

    cls = type("Counting", (Counting,), {"weighs_heads": weighs_heads})
    module, steps = small(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), Steps()
    given = batch()
    gradients = task_gradients(module, given)
    weighting = cls(at=place, every_n_steps=3, start_step=1)
    fit(module, loader(*[given] * 6), callbacks=[weighting, steps])
    expected = [[1.0, 1.0]] + [[2.0, 3.0]] * 3 + [[5.0, 6.0]] * 2
    assert [weights.tolist() for weights in steps.weights if weights is not None] == expected
    assert [signals.norms is not None for signals in steps.signals] == [False, True, False, False, True, False]
    for found, (a, b) in list(zip(steps.gradients, expected, strict=True))[1:]:
        update = expected_update(module, gradients, {"a": a, "b": b}, {}, weighs_heads=weighs_heads)
        assert_same(found, update, tolerance=1e-5)


def test_importance_is_multiplied_in_between_measurements_too() -> None:
    steps, weighting = Steps(), at("trunk", importance={"b": 3.0}, every_n_steps=2)
    fit(small(), loader(*batches(4, 4, 4, 4)), callbacks=[weighting, steps])
    assert [weights.tolist() for weights in steps.weights if weights is not None] == [[0.5, 6.0]] * 4
    assert weighting.held_weights.tolist() == [0.5, 2.0]  # multiplied in once, however long they serve


class Remembering(Weighting):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", torch.tensor(0.0))
        self.add_state("pairs", torch.zeros(2))
        self.add_state("calls", torch.tensor(0), per_task=False)
        self.seen: Tensor
        self.pairs: Tensor
        self.calls: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        assert self.seen.shape == (signals.num_tasks,)
        assert self.pairs.shape == (signals.num_tasks, 2)
        return torch.ones(signals.num_tasks)

    def update(self, signals: Signals) -> None:
        self.seen = self.seen + signals.losses
        self.pairs = self.pairs + 1
        self.calls = self.calls + 1


def test_declared_state_has_one_entry_a_task_and_begins_with_each_training() -> None:
    weighting, steps = Remembering(), Steps()
    for _ in range(2):
        steps.signals.clear()
        fit(small(), loader(*batches(4, 4)), callbacks=[weighting, steps])
        torch.testing.assert_close(weighting.seen, sum(s.losses for s in steps.signals))
        assert weighting.pairs.tolist() == [[2.0, 2.0]] * 2
        assert weighting.calls.item() == 2


def test_state_is_cut_to_the_present_tasks() -> None:
    weighting, (inputs, targets) = Remembering(), batch()
    fit(small(), loader((inputs, {"b": targets["b"]}), (inputs, targets)), callbacks=[weighting])
    assert weighting.pairs.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert weighting.calls.item() == 2


def test_state_survives_a_weigh_that_fails() -> None:
    weighting = Remembering()
    weighting.reset(["a", "b", "c"])

    def failing() -> None:
        with weighting.only([1]):
            weighting.seen = weighting.seen + 5
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert weighting.seen.tolist() == [0.0, 5.0, 0.0]


def test_importance_leaves_the_state_alone() -> None:
    plain, important = UncertaintyWeighting(lr=0.1), UncertaintyWeighting(lr=0.1, importance={"a": 7.0})
    module = small(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    for weighting in (plain, important):
        fit(module, loader(*batches(4, 4)), callbacks=[weighting])
    assert torch.equal(plain.log_variances, important.log_variances)


def test_a_monitor_changes_nothing() -> None:
    results = []
    for callbacks in ([], [Steps(), Steps()]):
        module = small()
        fit(module, loader(*batches(4, 4)), callbacks=[fixed(WEIGHTS, "gramian"), *callbacks])
        results.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*results)


def test_monitors_see_what_was_measured_and_applied() -> None:
    steps = Steps()
    fit(small(), loader(batch()), callbacks=[steps])
    assert steps.signals[0].tasks == TASKS
    assert steps.signals[0].norms is None
    assert steps.weights[0] is not None
    assert steps.weights[0].tolist() == [1.0, 1.0]
