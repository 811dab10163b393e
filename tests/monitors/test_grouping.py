"""The grouping is the best of all partitions, as brute force finds it, and the planted one where one is planted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_mtl.monitors import best_grouping, grouping_score


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for index, group in enumerate(smaller):
            yield [*smaller[:index], [first, *group], *smaller[index + 1 :]]


def score(z: Tensor, groups: list[list[int]], alone: float) -> float:
    """The sum over tasks of the mean affinity of the others in their group."""
    total = 0.0
    for group in groups:
        for j in group:
            others = [float(z[i, j]) for i in group if i != j]
            total += sum(others) / len(others) if others else alone
    return total


def affinities(num_tasks: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tasks, num_tasks, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("num_tasks", "alone"),
    [*itertools.product(range(1, 8), [0.0, 0.4, -math.inf]), pytest.param(8, 0.0, marks=pytest.mark.slow)],
)
def test_it_equals_brute_force(num_tasks: int, alone: float) -> None:
    z = affinities(num_tasks, seed=num_tasks)
    scored = [(score(z, groups, alone), len(groups)) for groups in partitions(list(range(num_tasks)))]
    for num_groups in range(1, num_tasks + 1):
        found = best_grouping(z, num_groups, alone=alone)
        assert sorted(task for group in found for task in group) == list(range(num_tasks))
        assert len(found) <= num_groups
        best = max(value for value, count in scored if count <= num_groups)
        assert score(z, found, alone) == pytest.approx(best, abs=1e-9)


def planted(groups: list[list[int]], seed: int) -> Tensor:
    z = 0.3 * affinities(sum(map(len, groups)), seed) - 1.0
    for group in groups:
        z[torch.tensor(group)[:, None], torch.tensor(group)] += 2.0
    return z


@pytest.mark.parametrize("seed", range(2))
def test_it_finds_planted_groups(seed: int) -> None:
    few = [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert best_grouping(planted(few, seed), 3) == few
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
    many = sorted(sorted(order[start::5]) for start in range(5))
    assert best_grouping(planted(many, seed), 5) == many


def test_beyond_twelve_tasks_no_move_improves_it() -> None:
    z = affinities(20, seed=3)
    found = best_grouping(z, 4)
    assert found == best_grouping(z.clone(), 4)
    best = grouping_score(z, found)
    for task in range(20):
        for target in range(4):
            moved = [[t for t in group if t != task] + [task] * (i == target) for i, group in enumerate(found)]
            assert grouping_score(z, [group for group in moved if group]) <= best + 1e-9


def test_the_diagonal_has_no_say_and_fewer_groups_win_a_tie() -> None:
    assert best_grouping(torch.diag(torch.tensor([9.0, -9.0, torch.nan])), 3) == [[0, 1, 2]]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found shape \[2, 3\]"):
        best_grouping(torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match=r"affinity\[0, 1\] is nan; tasks that were never measured together"):
        best_grouping(torch.tensor([[0.0, torch.nan], [0.0, 0.0]]), 1)
    with pytest.raises(ValueError, match="num_groups=3 must lie between 1 and the number of tasks, 2"):
        best_grouping(torch.zeros(2, 2), 3)
