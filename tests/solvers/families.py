"""Jacobians on which every solver has to satisfy its optimality condition, and the two of the golden values."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Family = Callable[[np.random.Generator, int], Array]

J1 = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
J2 = np.array([[1.0, 2.0, 3.0], [-2.0, 1.0, 0.5], [0.3, -1.0, 2.0]])

FAMILIES: dict[str, Family] = {}


class Case(NamedTuple):
    """A Jacobian ``[K, n]`` and the name of the family it was drawn from."""

    family: str
    rows: Array


def _family(function: Family) -> Family:
    FAMILIES[function.__name__] = function
    return function


def _normal(rng: np.random.Generator, num_tasks: int, width: int | None = None) -> Array:
    return rng.standard_normal((num_tasks, num_tasks + 3 if width is None else width))


def _norms(rng: np.random.Generator, num_tasks: int) -> Array:
    norms: Array = rng.permutation(np.geomspace(1e-8, 1e8, num_tasks))
    return norms[:, None]


@_family
def independent(rng: np.random.Generator, num_tasks: int) -> Array:
    return _normal(rng, num_tasks)


@_family
def low_rank(rng: np.random.Generator, num_tasks: int) -> Array:
    return _normal(rng, num_tasks, max(1, num_tasks // 2))


@_family
def strongly_stationary(rng: np.random.Generator, num_tasks: int) -> Array:
    rows = _normal(rng, num_tasks)
    rows -= rows.mean(axis=0)
    return rows


@_family
def weakly_stationary(rng: np.random.Generator, num_tasks: int) -> Array:
    """The first half of the rows sums to zero, the others are free."""
    rows = _normal(rng, num_tasks)
    half = max(2, num_tasks // 2)
    rows[:half] -= rows[:half].mean(axis=0)
    return rows


@_family
def rank_one(rng: np.random.Generator, num_tasks: int) -> Array:
    rows: Array = np.outer(rng.uniform(0.1, 2.0, num_tasks), rng.standard_normal(num_tasks))
    return rows


@_family
def opposite(rng: np.random.Generator, num_tasks: int) -> Array:
    rows = _normal(rng, num_tasks)
    rows[1] = -3.0 * rows[0]
    return rows


@_family
def nearly_parallel(rng: np.random.Generator, num_tasks: int) -> Array:
    return _normal(rng, 1, num_tasks + 3) + 1e-3 * _normal(rng, num_tasks)


@_family
def duplicated(rng: np.random.Generator, num_tasks: int) -> Array:
    rows = _normal(rng, num_tasks)
    rows[num_tasks // 2 :] = rows[: num_tasks - num_tasks // 2]
    return rows


@_family
def zero_rows(rng: np.random.Generator, num_tasks: int) -> Array:
    rows = _normal(rng, num_tasks)
    rows[:: max(2, num_tasks // 2)] = 0.0
    return rows


@_family
def norms_far_apart(rng: np.random.Generator, num_tasks: int) -> Array:
    return _normal(rng, num_tasks) * _norms(rng, num_tasks)


@_family
def norms_far_apart_low_rank(rng: np.random.Generator, num_tasks: int) -> Array:
    return low_rank(rng, num_tasks) * _norms(rng, num_tasks)


@_family
def tiny(rng: np.random.Generator, num_tasks: int) -> Array:
    return 1e-30 * _normal(rng, num_tasks)


@_family
def huge(rng: np.random.Generator, num_tasks: int) -> Array:
    return 1e30 * _normal(rng, num_tasks)


# By construction; of the others some are.
STATIONARY = {"strongly_stationary", "weakly_stationary", "opposite", "zero_rows"}
NEVER_STATIONARY = {"independent", "rank_one", "nearly_parallel", "norms_far_apart", "tiny", "huge"}
