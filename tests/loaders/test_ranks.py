"""Two processes: every sample as the mode says, none twice, and the training of one process with the same batches."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from tests.distributed.pairs import Pair
from tests.loaders import rank_worker
from tests.loaders.rank_worker import CASES, EVEN, RESUMED, SAVE_AFTER, SIZES
from tests.loaders.samples import Seen

Result = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pair: Pair) -> tuple[list[Result], Result]:
    """What the two ranks saw, and what one process saw with twice the batch size."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks: list[Result] = [{}, {}]
    single: Result = {}
    for name in CASES:
        for rank, found in enumerate(pair.run(rank_worker.train, name, folder)):
            ranks[rank] |= found
        single |= rank_worker.train(name, folder)
    return ranks, single


def together(parts: list[Seen]) -> dict[str, list[int]]:
    """The samples of a step on all ranks."""
    return {task: sorted(number for part in parts for number in part[task] or ()) for task in parts[0]}


def steps_of(result: Result) -> list[Seen]:
    return [step for epoch in result["epochs"] for step in epoch]


@pytest.mark.parametrize("name", [name for name in CASES if name != "iterables"])
def test_the_ranks_see_what_one_process_sees(name: str, trained: tuple[list[Result], Result]) -> None:
    ranks, single = trained
    found = list(zip(*(steps_of(result[name]) for result in ranks), strict=True))
    assert all(list(parts[0]) == list(parts[1]) for parts in found)  # the same tasks in the same order
    whole = [{task: sorted(seen or ()) for task, seen in step.items()} for step in steps_of(single[name])]
    assert [together(list(parts)) for parts in found] == whole


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("joint", {"a": 1, "b": 1.5, "c": 6}),
        ("round robin", {"a": 1, "b": 1.5, "c": 6}),
        ("proportional", {"a": 1, "b": 1, "c": 1}),
    ],
)
def test_samples_are_counted(name: str, times: dict[str, float], trained: tuple[list[Result], Result]) -> None:
    for epoch in range(rank_worker.EPOCHS):
        found: dict[str, Counter[int]] = {task: Counter() for task in SIZES}
        for result in trained[0]:
            for step in result[name]["epochs"][epoch]:
                for task, seen in step.items():
                    found[task].update(seen or ())
        for task, size in SIZES.items():
            assert sum(found[task].values()) == times[task] * size
            assert set(found[task]) == set(range(size))


@pytest.mark.parametrize(
    "name", [name for name in CASES if name not in ("joint", "round robin", "proportional", "iterables")]
)
def test_training_is_that_of_one_process(name: str, trained: tuple[list[Result], Result]) -> None:
    """Where batches divide evenly, so that the mean over ranks is the mean over samples."""
    ranks, single = trained
    assert EVEN["a"] % 4 == 0
    for result in ranks:
        torch.testing.assert_close(result[name]["parameters"], single[name]["parameters"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_bit_and_figures_are_those_of_one_process(
    name: str, trained: tuple[list[Result], Result]
) -> None:
    (first, second), single = trained
    assert torch.equal(first[name]["parameters"], second[name]["parameters"])
    assert first[name]["metrics"] == second[name]["metrics"]
    assert {"val/loss/a", "val/loss/b"} <= first[name]["metrics"].keys() == single[name]["metrics"].keys()


@pytest.mark.parametrize("name", RESUMED)
def test_validation_sees_every_sample_once(name: str, trained: tuple[list[Result], Result]) -> None:
    for task, size in {"a": 5, "b": 3}.items():
        found = Counter(number for result in trained[0] for number in result[name]["validated"][task])
        assert found == Counter(dict.fromkeys(range(size), rank_worker.EPOCHS))


def test_ranks_divide_iterable_data(trained: tuple[list[Result], Result]) -> None:
    first, second = (steps_of(result["iterables"]) for result in trained[0])
    assert [list(step) for step in first] == [list(step) for step in second] == [[task] for task in "abcabcabc"] * 2
    for task in SIZES:
        seen = [{number for step in steps for number in step.get(task) or ()} for steps in (first, second)]
        assert not seen[0] & seen[1]


@pytest.mark.parametrize("name", RESUMED)
def test_ranks_resume_at_the_next_unseen_batch(name: str, trained: tuple[list[Result], Result]) -> None:
    for result in trained[0]:
        assert steps_of(result[f"{name}, resumed"]) == steps_of(result[name])[SAVE_AFTER:]
        assert torch.equal(result[f"{name}, resumed"]["parameters"], result[name]["parameters"])
