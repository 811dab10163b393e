"""Fixtures that run a test over the families of Jacobians."""

import numpy as np
import pytest

from tests.solvers.families import FAMILIES, Array, Case


@pytest.fixture(params=[(name, k) for name in FAMILIES for k in (2, 3, 5, 16, 64)], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    """One Jacobian of each family and size."""
    name, num_tasks = request.param
    # Not hash(name): it differs from one process to the next.
    rng = np.random.default_rng([num_tasks, *name.encode()])
    return Case(name, FAMILIES[name](rng, num_tasks))


@pytest.fixture(params=range(30))
def independent_rows(request: pytest.FixtureRequest) -> Array:
    """Well-conditioned Jacobians of two and three rows, for the oracles that only work there."""
    rng = np.random.default_rng(request.param)
    num_tasks = 2 + request.param % 2
    scales: Array = 10.0 ** rng.uniform(-1, 1, num_tasks)
    return scales[:, None] * rng.standard_normal((num_tasks, 5))
