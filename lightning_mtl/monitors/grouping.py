"""Groups tasks that should be learned together, by their affinities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

MOST_EXACT = 12
"""The most tasks that all partitions are weighed for: 3^12 pairs of subsets take a fraction of a second."""

_Matrix = npt.NDArray[np.float64]
_Groups = list[list[int]]


def best_grouping(affinity: Tensor, num_groups: int, *, alone: float = 0.0) -> list[list[int]]:
    r"""Find the partition into at most ``num_groups`` groups in which tasks get the most help from their group.

    .. math:: \max_{\mathcal{P}} \sum_{S \in \mathcal{P}} f(S), \qquad
        f(S) = \sum_{j \in S} \frac{1}{|S| - 1} \sum_{i \in S, i \ne j} Z_{i \to j}

    so that each task counts the mean affinity of the others in its group onto it, and a task by itself counts
    ``alone``. Up to 12 tasks the best partition is found exactly, by dynamic programming over subsets. Beyond, groups
    are merged greedily and then tasks moved and exchanged one at a time for as long as that helps, from two beginnings,
    which may end beside the best. The answer depends on the arguments alone; of equally good partitions the one with
    fewer groups is taken.

    Args:
        affinity: ``[K, K]``, Z; row i, column j is what a step for task i does for task j. The diagonal is ignored.
        num_groups: The most groups that may be made.
        alone: What a task by itself counts: 0 is neither help nor harm; ``-inf`` leaves no task by itself, as the
            paper's code does.

    Returns:
        The groups, each a list of task indices in ascending order, sorted by their first task.

    Raises:
        ValueError: If the matrix is not square, holds what is not finite, or the number of groups is out of its range.

    Source: Fifty et al., Efficiently Identifying Task Groupings for Multi-Task Learning, 2021, arXiv:2109.04617.

    Deviations: the paper lets a task be trained in several groups and used from the best of them, at a budget of
    networks; here each task is in one group.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 0.3, -0.1], [0.2, 0.0, -0.1], [-0.2, -0.3, 0.0]])
        >>> best_grouping(z, num_groups=2)
        [[0, 1], [2]]
    """
    matrix = affinity.detach().cpu().double().numpy().copy()
    _check_matrix(matrix, num_groups)
    np.fill_diagonal(matrix, 0.0)
    alone = max(alone, -1 - 4 * float(np.abs(matrix).sum()))  # as good as -inf, and differences of it are numbers
    groups = _exact(matrix, num_groups, alone) if len(matrix) <= MOST_EXACT else _searched(matrix, num_groups, alone)
    return sorted(sorted(group) for group in groups)


def grouping_score(affinity: Tensor, groups: Sequence[Sequence[int]], *, alone: float = 0.0) -> float:
    """Compute the sum that :func:`best_grouping` maximizes.

    Args:
        affinity: ``[K, K]``, Z.
        groups: Disjoint lists of task indices.
        alone: What a task by itself counts.

    Example:
        >>> import torch
        >>> round(grouping_score(torch.tensor([[0.0, 0.3], [0.2, 0.0]]), [[0, 1]]), 6)
        0.5
    """
    matrix = affinity.detach().cpu().double().numpy().copy()
    np.fill_diagonal(matrix, 0.0)
    return sum(_value(matrix, list(group), alone) for group in groups)


def _check_matrix(matrix: _Matrix, num_groups: int) -> None:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"best_grouping needs a [K, K] matrix of affinities, found shape {list(matrix.shape)}.")
    beside = ~np.eye(len(matrix), dtype=bool)
    if not np.isfinite(matrix[beside]).all():
        first, second = np.argwhere(~np.isfinite(matrix) & beside)[0].tolist()
        raise ValueError(
            f"affinity[{first}, {second}] is {matrix[first, second]}; tasks that were never measured together have no "
            "affinity: measure more steps, or fill the gap in with 0."
        )
    if not 1 <= num_groups <= len(matrix):
        raise ValueError(f"num_groups={num_groups} must lie between 1 and the number of tasks, {len(matrix)}.")


def _value(matrix: _Matrix, group: list[int], alone: float) -> float:
    if len(group) < 2:
        return alone
    return float(matrix[np.ix_(group, group)].sum()) / (len(group) - 1)


def _exact(matrix: _Matrix, num_groups: int, alone: float) -> _Groups:
    """Find the best partition by dynamic programming over subsets, with one group more in each round.

    A subset of tasks is a number whose bit i is set where task i is in it.
    """
    num_tasks = len(matrix)
    subsets = np.arange(1 << num_tasks)
    members = (subsets[:, None] >> np.arange(num_tasks)) & 1
    sizes = members.sum(1)
    inside = np.einsum("si,ij,sj->s", members, matrix, members, optimize=True)
    values = np.where(sizes < 2, alone, inside / np.maximum(sizes - 1, 1))
    # best[s] is the value of the best partition of s into the groups allowed so far, chosen[r][s] the group that it
    # splits off in round r. With one group that is s itself.
    best, chosen = values.copy(), [subsets.copy()]
    for _ in range(1, num_groups):
        better, choice = best.copy(), np.zeros_like(subsets)
        for subset in range(1, 1 << num_tasks):
            # Some group holds the subset's lowest task: only those are tried, so that no partition is seen twice.
            lowest = subset & -subset
            parts = _parts_with(subset ^ lowest) | lowest
            parts = parts[parts != subset]
            if not len(parts):
                continue
            sums = values[parts] + best[subset ^ parts]
            at = int(sums.argmax())
            if sums[at] > better[subset] + 1e-12:  # of equally good partitions, the one with fewer groups stays
                better[subset], choice[subset] = sums[at], parts[at]
        best = better
        chosen.append(choice)
    groups, left = [], (1 << num_tasks) - 1
    for choice in reversed(chosen):
        if left and choice[left]:  # 0: one group fewer did as well
            groups.append([task for task in range(num_tasks) if choice[left] >> task & 1])
            left ^= int(choice[left])
    return groups


def _parts_with(subset: int) -> npt.NDArray[np.int64]:
    """All subsets of a subset, itself and the empty one included."""
    parts = np.zeros(1, dtype=np.int64)
    while subset:
        bit = subset & -subset
        parts = np.concatenate([parts, parts | bit])
        subset ^= bit
    return parts


def _searched(matrix: _Matrix, num_groups: int, alone: float) -> _Groups:
    """The better of two local optima: from merged single tasks, and from all tasks in one group."""
    together = [list(range(len(matrix)))] + [[] for _ in range(num_groups - 1)]
    found = [_improved(matrix, groups, alone) for groups in (_merged(matrix, num_groups, alone), together)]
    return max(found, key=lambda groups: sum(_value(matrix, group, alone) for group in groups))


def _merged(matrix: _Matrix, num_groups: int, alone: float) -> _Groups:
    """Merge the two groups that gain most by it, until they are few enough and no merger gains."""
    groups = [[task] for task in range(len(matrix))]
    while len(groups) > 1:
        gains = [
            (_value(matrix, a + b, alone) - _value(matrix, a, alone) - _value(matrix, b, alone), -i, -j)
            for i, a in enumerate(groups)
            for j, b in enumerate(groups[:i])
        ]
        gain, first, second = max(gains)
        if len(groups) <= num_groups and gain <= 0:
            break
        groups[-first] = groups[-first] + groups[-second]
        del groups[-second]
    return groups + [[] for _ in range(num_groups - len(groups))]


def _improved(matrix: _Matrix, groups: _Groups, alone: float) -> _Groups:
    """Move single tasks, or exchange two, for as long as the sum grows."""
    groups = [sorted(group) for group in groups]
    improves = True
    while improves:
        improves = False
        for task in range(len(matrix)):
            source = next(group for group in groups if task in group)
            for target in groups:
                if target is not source and _exchange_if_better(matrix, source, target, [task], [], alone):
                    improves = True
                    break
            else:
                pairs = [(target, other) for target in groups if target is not source for other in target]
                improves |= any(
                    _exchange_if_better(matrix, source, target, [task], [other], alone) for target, other in pairs
                )
    return [group for group in groups if group]


def _exchange_if_better(
    matrix: _Matrix, source: list[int], target: list[int], leaving: list[int], coming: list[int], alone: float
) -> bool:
    """Exchange tasks between two groups if their sum grows."""
    new_source = [task for task in source if task not in leaving] + coming
    new_target = [task for task in target if task not in coming] + leaving
    before = _group_sum(matrix, source, target, alone)
    if not _group_sum(matrix, new_source, new_target, alone) > before + 1e-12:
        return False
    source[:], target[:] = new_source, new_target
    return True


def _group_sum(matrix: _Matrix, first: list[int], second: list[int], alone: float) -> float:
    return sum(_value(matrix, group, alone) for group in (first, second) if group)
