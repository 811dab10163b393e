"""Gradient accumulation: as Lightning accumulates, and, for rows, as if the micro-batches were one batch."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task, TaskOutput
from lightning_mtl.weighting import StaticWeights
from tests.automatic import WAYS, Run, assert_same_history
from tests.training import Steps, fit, flat_parameters, loader
from tests.weightings import WeightedSum, fixed

WEIGHTS = {"a": 1.5, "b": -0.5}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("accumulate", "batches"), [(2, 4), (2, 5), (3, 5), (4, 3)])
def test_as_automatic_optimization_accumulates(way: str, accumulate: int, batches: int) -> None:
    _, manual = assert_same_history(Run(way=way, accumulate=accumulate, batches=batches))
    moved = [not torch.equal(a, b) for a, b in zip(manual.parameters, manual.parameters[1:], strict=False)]
    # Only a window's last micro-batch moves anything.
    expected = [(i + 1) % accumulate == 0 or i + 1 == batches for i in range(batches)] * 2
    assert moved == expected[1:]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("interval", [1, 3])
def test_validation_in_the_middle_of_a_window(way: str, interval: int) -> None:
    assert_same_history(Run(way=way, accumulate=2, batches=7, val=True, trainer={"val_check_interval": interval}))


@pytest.mark.parametrize("way", WAYS)
def test_an_epoch_cut_short(way: str) -> None:
    assert_same_history(Run(way=way, accumulate=2, batches=7, trainer={"limit_train_batches": 3}))


@pytest.mark.parametrize("way", WAYS)
def test_training_that_ends_within_an_epoch(way: str) -> None:
    _, manual = assert_same_history(Run(way=way, accumulate=2, batches=7, trainer={"max_steps": 2}))
    assert len(manual.parameters) == 4


class Counted(MultiTaskModule):
    """Each task's loss is the mean over the samples that have a label of it (a target that is no nan)."""

    def task_losses(self, batch: Any) -> dict[str, TaskOutput]:
        inputs, targets = batch
        predictions = self(inputs)
        outputs = {}
        for task, target in targets.items():
            labeled = ~target.isnan().squeeze(1)
            count = int(labeled.sum())
            if count:
                loss = mse_loss(predictions[task][labeled], target[labeled])
                outputs[task] = TaskOutput(loss, num_samples=count)
        return outputs


def module(accumulate: int) -> Counted:
    torch.manual_seed(4)
    return Counted(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh()),
        {task: nn.Linear(4, 1) for task in WEIGHTS},
        {task: Task(mse_loss) for task in WEIGHTS},
        accumulate_grad_batches=accumulate,
        optimizer=functools.partial(torch.optim.SGD, lr=1.0),
    ).double()


def samples(number: int, unlabeled: list[int], task: str = "b") -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(number, 3, generator=generator, dtype=torch.float64)
    targets = {task: torch.randn(number, 1, generator=generator, dtype=torch.float64) for task in WEIGHTS}
    targets[task][unlabeled] = torch.nan
    return inputs, targets


def split(whole: tuple[Tensor, dict[str, Tensor]], sizes: list[int]) -> list[Any]:
    inputs, targets = whole
    parts = [inputs.split(sizes), *(target.split(sizes) for target in targets.values())]
    return [(x, dict(zip(targets, ys, strict=True))) for x, *ys in zip(*parts, strict=True)]


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize(
    ("sizes", "unlabeled", "task"),
    [
        ([2, 2, 2, 2], [], "b"),
        ([1, 4, 3], [], "b"),
        ([3, 3, 2], [0, 4, 5], "b"),
        ([2, 6], [0, 1], "b"),
        ([2, 6], [0, 1], "a"),
    ],
    ids=["equal", "unequal", "partly labeled", "b later", "a later"],
)
def test_rows_of_micro_batches_are_those_of_one_large_batch(
    sizes: list[int], unlabeled: list[int], task: str, aggregate: bool
) -> None:
    whole, found = samples(sum(sizes), unlabeled, task), []
    for accumulate, given in ((1, [whole]), (len(sizes), split(whole, sizes))):
        model, steps = module(accumulate), Steps()
        before = flat_parameters(model)
        weighting = WeightedSum(WEIGHTS) if aggregate else fixed(WEIGHTS, "gramian", weighs_heads=False)
        fit(model, loader(*given), callbacks=[steps, weighting])
        found.append((before - flat_parameters(model), steps.signals[0]))
    (large_update, large), (small_update, small) = found
    torch.testing.assert_close(small_update, large_update, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small.losses, large.losses, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small.norms, large.norms, rtol=1e-6, atol=1e-9)
    if not aggregate:
        torch.testing.assert_close(small.gramian, large.gramian, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("measures", ["losses", "gramian"])
def test_the_weighting_is_asked_and_updated_once_a_window(measures: str) -> None:
    weighting = fixed(WEIGHTS, measures, at="features")
    model = module(accumulate=3)
    fit(model, loader(*split(samples(12, []), [2] * 6)), callbacks=[weighting])
    assert len(weighting.asked) == len(weighting.observed) == 2
    assert [signals.step for signals in weighting.observed] == [0, 1]


def test_weights_known_beforehand_serve_the_whole_window() -> None:
    """A method that reads nothing but its state is asked once, at the first micro-batch, if that one has all tasks."""
    weighting = fixed(WEIGHTS, "losses")
    weighting.reads_losses = False  # type: ignore[misc]  # as a subclass would say
    fit(module(accumulate=3), loader(*split(samples(12, []), [2] * 6)), callbacks=[weighting])
    assert len(weighting.asked) == len(weighting.observed) == 2


def test_the_state_is_updated_with_the_windows_mean_losses() -> None:
    weighting = fixed(WEIGHTS, "losses")
    model = module(accumulate=2)
    whole = samples(6, [])
    expected = [output.loss for output in copy.deepcopy(model).task_losses(whole).values()]
    fit(model, loader(*split(whole, [1, 5])), callbacks=[weighting])
    torch.testing.assert_close(weighting.observed[0].losses, torch.stack(expected).detach())
    # What reads the losses is asked when all of them are known.
    torch.testing.assert_close(weighting.asked[0].losses, torch.stack(expected).detach())


@pytest.mark.parametrize("measures", ["losses", "gramian"])
def test_tasks_that_take_turns_within_a_window_are_all_observed(measures: str) -> None:
    inputs, targets = samples(4, [])
    turns = [({"a": (inputs, targets["a"])}), ({"b": (inputs, targets["b"])})]
    weighting, steps = fixed(WEIGHTS, measures, at="features"), Steps()
    model = MultiTaskModule(
        nn.Linear(3, 4),
        {task: nn.Linear(4, 1) for task in WEIGHTS},
        {task: Task(mse_loss) for task in WEIGHTS},
        accumulate_grad_batches=2,
    ).double()
    trainer = fit(model, loader(*turns), callbacks=[steps, weighting])
    assert weighting.observed[0].tasks == ("a", "b")
    assert steps.signals[0].tasks == ("a", "b")
    assert {"loss/a", "loss/b", "weight/a", "weight/b"} <= trainer.callback_metrics.keys()


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("order", [("ab", "a"), ("a", "ab"), ("a", "b"), ("b", "ab", "")], ids="-".join)
def test_weights_that_are_known_accumulate_as_plain_training_whichever_tasks_come_first(
    order: tuple[str, ...], automatic: bool
) -> None:
    """Σ_k w_k L_k / N, summed over the N micro-batches: as without a weighting."""
    window = split(samples(3 * len(order) + 1, [1], "a"), [*[3] * (len(order) - 1), 4])
    for (_, targets), tasks in zip(window, order, strict=True):
        for task in set(targets) - set(tasks):
            targets[task] = torch.full_like(targets[task], torch.nan)
    weights, size = {"a": 1.5, "b": 0.5}, len(order)
    model = module(1 if automatic else size)
    model.automatic_optimization = automatic
    plain = copy.deepcopy(model)
    for batch in window:
        for task, output in plain.task_losses(batch).items():
            (weights[task] * output.loss / size).backward(retain_graph=True)
    expected = torch.cat([(p - p.grad).flatten() for p in plain.parameters() if p.grad is not None])
    fit(model, loader(*window), callbacks=[StaticWeights(weights)], accumulate_grad_batches=size if automatic else 1)
    torch.testing.assert_close(flat_parameters(model), expected.detach(), rtol=1e-9, atol=1e-12)
