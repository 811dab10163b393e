"""Which tasks a step takes, counted; and what the modes refuse."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest
import torch

from lightning_mtl.data import Joint, Mixing, MultiTaskDataModule, Proportional, Ratios, RoundRobin, Schedule
from tests.loaders.samples import Flowing, Numbered


def wrong(mode: Any, argument: Any) -> Any:
    """A mode with an argument that a type checker would refuse."""
    return mode(argument)


def with_mixing(mixing: Any) -> MultiTaskDataModule:
    return MultiTaskDataModule({"a": Numbered(3)}, mixing=mixing)


SIZES: dict[str, int | None] = {"a": 38, "b": 10, "c": 2}


def taken(mode: Mixing, steps: int, seed: int = 0, sizes: Any = None) -> list[tuple[str, ...]]:
    return list(mode.order(sizes or SIZES, steps, torch.Generator().manual_seed(seed)))


def counts(mode: Mixing, steps: int, seed: int = 0) -> list[int]:
    found = Counter(taken(mode, steps, seed))
    return [found[(task,)] for task in SIZES]


def test_joint_takes_every_task_in_every_step() -> None:
    assert Joint().steps(SIZES) == 38
    assert Joint("shortest").steps(SIZES) == 2
    assert taken(Joint(), 5) == [("a", "b", "c")] * 5


def test_round_robin_takes_turns() -> None:
    assert RoundRobin().steps(SIZES) == 3 * 38
    assert RoundRobin("shortest").steps(SIZES) == 3 * 2
    assert taken(RoundRobin(), 7) == [(task,) for task in "abcabca"]


@pytest.mark.parametrize("seed", range(20))
def test_in_proportion_an_epoch_is_one_pass_over_everything(seed: int) -> None:
    assert Proportional().steps(SIZES) == 50
    assert counts(Proportional(), 50, seed) == [38, 10, 2]


def test_the_order_is_random_and_a_function_of_the_generator() -> None:
    first, again, other = (taken(Proportional(), 50, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first != sorted(first)


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        (Proportional(temperature=2), [38**0.5, 10**0.5, 2**0.5]),
        (Proportional(temperature=5), [38**0.2, 10**0.2, 2**0.2]),
        (Proportional(temperature=math.inf), [1, 1, 1]),
        (Ratios({"a": 1, "b": 2.5, "c": 0}), [1, 2.5, 0]),
    ],
)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_shares_hold_within_one_step_in_an_epoch_and_exactly_in_the_mean(
    mode: Mixing, weights: list[float], steps: int
) -> None:
    shares = [steps * weight / sum(weights) for weight in weights]
    found = [counts(mode, steps, seed) for seed in range(400)]
    for epoch in found:
        assert sum(epoch) == steps
        assert all(math.floor(share) <= count <= math.ceil(share) for count, share in zip(epoch, shares, strict=True))
    # A share's fraction is the chance of one more: the mean of 400 lies within four standard deviations.
    for index, share in enumerate(shares):
        mean = sum(epoch[index] for epoch in found) / len(found)
        assert abs(mean - share) <= 4 * (0.25 / len(found)) ** 0.5


def test_a_schedule_has_the_mode_of_its_epoch_and_the_steps_of_the_first() -> None:
    schedule = Schedule({0: RoundRobin(), 3: Joint(), 5: Ratios({"a": 0, "b": 0, "c": 1})})
    found = [type(schedule.in_epoch(epoch)).__name__ for epoch in range(7)]
    assert found == ["RoundRobin"] * 3 + ["Joint"] * 2 + ["Ratios"] * 2
    assert schedule.steps(SIZES) == RoundRobin().steps(SIZES)
    annealed = Schedule(lambda epoch: Proportional(temperature=1 + epoch))
    assert annealed.in_epoch(4) == Proportional(temperature=5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Proportional(temperature=0), "temperature=0) must be above 0"),
        (lambda: Proportional(temperature=-1), "must be above 0"),
        (lambda: Proportional(temperature=math.nan), "must be above 0"),
        (lambda: Ratios({"a": -1}), "Ratios gives 'a' the ratio -1; it must be a finite number"),
        (lambda: Ratios({"a": math.inf}), "must be a finite number"),
        (lambda: Ratios({"a": 0, "b": 0}), "draws no task at all"),
        (lambda: wrong(Joint, "longer"), "Joint(until='longer') must be 'longest' or 'shortest'"),
        (lambda: wrong(RoundRobin, 3), "RoundRobin(until=3) must be"),
        (lambda: Schedule({1: Joint()}), "say one for epoch 0"),
        (lambda: Schedule({0: Joint(), -1: Joint()}), "say one for epoch 0"),
    ],
)
def test_wrong_values_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ratios({}), "Ratios must get {task: number}"),
        (lambda: wrong(Ratios, [1, 2]), "Ratios must get {task: number}"),
        (
            lambda: wrong(Schedule, {0: "joint"}),
            "Schedule has 'joint' for epoch 0, where a mode such as Joint() belongs",
        ),
        (lambda: Schedule({0: Schedule({0: Joint()})}), "where a mode such as Joint() belongs"),
        (lambda: wrong(Schedule, 3), "must get {first epoch: mode} or a function of the epoch"),
        (lambda: wrong(Schedule, lambda epoch: epoch).in_epoch(0), "Schedule has 0 for epoch 0"),
        (lambda: with_mixing("joint"), "mixing must be Joint(), RoundRobin()"),
        (lambda: with_mixing(Joint), "mixing must be Joint(), RoundRobin()"),
    ],
)
def test_what_is_no_mode_is_refused(make: Any, words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        make()


def test_ratios_name_the_tasks_of_the_data() -> None:
    for names in (["a"], ["a", "b", "z"]):
        message = re.escape(f"Ratios names the tasks {names}, the training data has ['a', 'b']")
        for mode in (Ratios(dict.fromkeys(names, 1.0)), Schedule({0: Joint(), 2: Ratios(dict.fromkeys(names, 1.0))})):
            with pytest.raises(ValueError, match=message):
                MultiTaskDataModule({"a": Numbered(3), "b": Numbered(4)}, mixing=mode)


@pytest.mark.parametrize("mode", [Joint(), RoundRobin("shortest"), Ratios({"a": 1, "b": 1})], ids=repr)
def test_an_epoch_without_an_end_is_refused(mode: Mixing) -> None:
    data = MultiTaskDataModule({"a": Numbered(3), "b": Flowing(3)}, mixing=mode)
    with pytest.raises(ValueError, match=re.escape("data of ['b'] have no length") + ".*set steps_per_epoch"):
        data.train_dataloader()


def test_in_proportion_to_an_unknown_size_is_refused_and_ratios_offered() -> None:
    data = MultiTaskDataModule({"a": Numbered(3), "b": Flowing(3)}, mixing=Proportional(), steps_per_epoch=3)
    with pytest.raises(ValueError, match=re.escape("Proportional draws tasks by their sizes") + ".*Ratios.ratios="):
        next(iter(data.train_dataloader()))
