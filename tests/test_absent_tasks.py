"""Batches that lack a task: its weight is 0, its head and its state stay as they are."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule
from lightning_mtl.transfer import only_tasks
from lightning_mtl.weighting import DTP, DWA, LBTW, MGDA, GradientNormBalance, GradNorm, UncertaintyWeighting
from tests.gradients.oracle import assert_same, expected_update, rows_at, task_gradients
from tests.small import Batch, batch, binary, small
from tests.training import Steps, fit, gradients_of, loader
from tests.weightings import WeightedSum, fixed

TASKS = ("a", "b", "c")
WEIGHTS = {"a": 0.5, "b": 3.0, "c": -1.0}
PLACES = ("losses", "trunk", "features", "last_layer")


def module(**arguments: Any) -> MultiTaskModule:
    return small(TASKS, **arguments)


def labeled(*tasks: str, seed: int = 5) -> Batch:
    return batch(4, seed, tasks)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("present", [("a", "c"), ("b",)])
def test_the_method_gets_the_sub_problem_of_the_present_tasks(place: str, present: tuple[str, ...]) -> None:
    model, given = module().double(), labeled(*present)
    given = given[0].double(), {task: target.double() for task, target in given[1].items()}
    gradients = task_gradients(model, given)
    rows = rows_at(model, gradients, list(model.trunk.parameters()))
    expected = expected_update(model, gradients, WEIGHTS, {}, weighs_heads=True)
    weighting = fixed(WEIGHTS, "losses") if place == "losses" else fixed(WEIGHTS, "gramian", at=place)
    steps = Steps()
    trainer = fit(model, loader(given), callbacks=[weighting, steps])
    asked = weighting.asked[0]
    assert asked.tasks == weighting.observed[0].tasks == present
    assert asked.losses.shape == (len(present),)
    assert_same(steps.gradients[0], expected)
    assert all(p.grad is None for k in TASKS if k not in present for p in model.heads[k].parameters())
    if place == "trunk":
        torch.testing.assert_close(asked.gramian, rows @ rows.T)
    logged = {name for name in trainer.callback_metrics if name.startswith("weight/")}
    assert logged == {f"weight/{task}" for task in present}


class Penalized(MultiTaskModule):
    """Keeps the trunk's weights and its output small."""

    def task_losses(self, given: Batch) -> Any:
        self.features = self.trunk(given[0])
        return {task: mse_loss(self.heads[task](self.features), target) for task, target in given[1].items()}

    def penalties(self) -> dict[str, Tensor]:
        return {"weights": next(self.trunk.parameters()).square().sum(), "features": self.features.square().sum()}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_penalties_count_where_no_task_has_a_label(accumulate: int, place: str) -> None:
    model, given, steps = module(cls=Penalized), [labeled(seed=seed) for seed in range(accumulate)], Steps()
    model.accumulate_grad_batches = accumulate
    for one in given:
        model.task_losses(one)
        (torch.stack(list(model.penalties().values())).sum() / accumulate).backward()
    expected = gradients_of(model)
    model.zero_grad()
    weighting = fixed(WEIGHTS, "losses") if place == "losses" else fixed(WEIGHTS, "gramian", at=place)
    fit(model, loader(*given), callbacks=[weighting, steps])
    assert_same(steps.gradients[0], expected, tolerance=1e-5)
    assert not weighting.asked


def test_an_aggregator_gets_the_rows_of_the_present_tasks() -> None:
    aggregator = WeightedSum(WEIGHTS)
    fit(module(), loader(labeled("b", "c"), labeled("a", "b", "c")), callbacks=[aggregator])
    assert [len(rows) for rows in aggregator.rows] == [2, 3]


@pytest.mark.parametrize("place", PLACES)
def test_an_absent_head_stays_as_it_is_under_momentum_and_weight_decay(place: str) -> None:
    model = module(optimizer=functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5))
    weighting = fixed(WEIGHTS, "losses") if place == "losses" else fixed(WEIGHTS, "norms", at=place)
    heads: list[Tensor] = []

    class Watch(Steps):
        def on_train_batch_end(self, *_: Any) -> None:
            heads.append(torch.cat([p.detach().flatten() for p in model.heads["b"].parameters()]).clone())

    given = [labeled(*TASKS), labeled("a", "c"), labeled("a"), labeled(*TASKS)]
    fit(model, loader(*given), callbacks=[weighting, Watch()])
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[1], heads[2])
    assert not torch.equal(heads[2], heads[3])


@pytest.mark.parametrize("place", PLACES)
def test_a_batch_without_any_task_changes_nothing(place: str) -> None:
    weighting = fixed(WEIGHTS, "losses") if place == "losses" else fixed(WEIGHTS, "gramian", at=place)
    steps, model = Steps(), module()
    trainer = fit(model, loader((torch.ones(2, 3), {}), labeled("a", "b")), callbacks=[weighting, steps])
    assert trainer.global_step == 2
    assert all(gradient is None for gradient in steps.gradients[0].values())
    assert [signals.tasks for signals in steps.signals] == [("a", "b")]


def test_the_states_of_absent_tasks_wait() -> None:
    def states(*present: tuple[str, ...]) -> list[Tensor]:
        weighting = UncertaintyWeighting(lr=0.1)
        fit(module(), loader(*(labeled(*tasks) for tasks in present)), callbacks=[weighting])
        return [weighting.log_variances, weighting.mean, weighting.spread, weighting.steps]

    once = states(TASKS)
    longer = states(TASKS, ("a", "c"), ("a",))
    assert longer[3].tolist() == [3.0, 1.0, 2.0]
    for short, long in zip(once, longer, strict=True):
        assert short[1] == long[1]
        assert short[0] != long[0]


@pytest.mark.parametrize(
    "make", [GradNorm, LBTW, functools.partial(LBTW, reference="training")], ids=["GradNorm", "epoch", "training"]
)
def test_the_first_loss_is_that_of_a_tasks_first_present_step(make: Any) -> None:
    weighting, steps = make(), Steps()
    given = [labeled("a", "c"), labeled("a"), labeled(*TASKS, seed=8), labeled("b", seed=9)]
    fit(module(), loader(*given), callbacks=[weighting, steps])
    first = steps.signals
    expected = [first[0].losses[0], first[2].losses[1], first[0].losses[1]]
    assert torch.equal(weighting.first_losses, torch.stack(expected))


def test_epoch_means_of_a_task_without_a_batch_in_an_epoch() -> None:
    model, weighting = module(optimizer=functools.partial(torch.optim.SGD, lr=0.0)), DWA()

    class Alternating(MultiTaskModule):
        def task_losses(self, given: Any) -> Any:
            scale = [4.0, 2.0, 1.0, 1.0][self.current_epoch]
            found = {k: scale * output.loss for k, output in super().task_losses(given).items()}  # type: ignore[union-attr]
            return {"a": found["a"]} if self.training and self.current_epoch == 1 else found

    model.__class__ = Alternating
    steps = Steps()
    fit(model, loader(labeled(*TASKS)), callbacks=[weighting, steps], max_epochs=4)
    ones = torch.ones(3)
    # b and c have one mean, that of the first epoch, when the third begins, and two in the fourth: 1 / 4.
    assert steps.weights[0] is not None
    assert torch.equal(steps.weights[0], ones)
    third, fourth = (3 * torch.softmax(torch.tensor(ratios) / 2, 0) for ratios in ([0.5, 1, 1], [0.5, 0.25, 0.25]))
    torch.testing.assert_close(steps.weights[2], third)
    torch.testing.assert_close(steps.weights[3], fourth)


def test_a_validation_without_a_task_leaves_its_performance() -> None:
    class Forgetting(MultiTaskModule):
        """Validates b perfectly, then not at all well, then without a sample."""

        def task_losses(self, given: Any) -> Any:
            found: Any = super().task_losses(given)
            if self.training:
                return found
            target = given[1]["b"]
            found["b"].prediction = target if self.current_epoch == 0 else 1 - target
            return found if self.current_epoch < 2 else {"a": found["a"]}

    weighting = DTP("accuracy", alpha=0.5)
    performance = []

    class Watch(Steps):
        def on_validation_end(self, *_: Any) -> None:
            performance.append(weighting.performance.clone())

    fit(binary(cls=Forgetting), loader(batch()), loader(batch()), callbacks=[weighting, Watch()], max_epochs=4)
    assert [float(values[1]) for values in performance] == [1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("make", [MGDA, GradientNormBalance, GradNorm])
def test_weights_of_a_task_alone(make: Any) -> None:
    steps = Steps()
    fit(module(), loader(labeled("b"), labeled("b")), callbacks=[make(), steps])
    for weights in steps.weights:
        assert weights is not None
        assert weights[1] == pytest.approx(1.0)


def test_weights_held_between_measurements_know_nothing_of_a_task_that_was_absent() -> None:
    steps = Steps()
    weighting = fixed(WEIGHTS, "norms", every_n_steps=2)
    given = [labeled("a", "c"), labeled(*TASKS), labeled(*TASKS), labeled("b")]
    fit(module(), loader(*given), callbacks=[weighting, steps])
    assert [s.tasks for s in weighting.asked] == [("a", "c"), TASKS]
    second, fourth = steps.weights[1], steps.weights[3]
    assert second is not None
    assert fourth is not None
    assert second.tolist() == [0.5, 1.0, -1.0]
    assert fourth[1] == 3.0


def test_a_task_that_the_whole_first_epoch_lacks_is_told_of_once() -> None:
    given = (labeled("a", seed=1), labeled("a", "b", seed=2))
    with pytest.warns(UserWarning, match="No step of the first epoch") as caught:
        fit(module(), loader(*given), max_epochs=2)
    said = [str(warning.message) for warning in caught if "first epoch" in str(warning.message)]
    assert len(said) == 1
    assert "trained the tasks ['c']: they were absent" in said[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "No step of the first epoch")
        fit(module(), loader(*given, labeled("c")))  # seen once is enough
        fit(only_tasks(module(), ["a", "b"]), loader(*given))  # asked for
