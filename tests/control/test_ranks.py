"""Tasks that stop on two processes: both decide alike, and train as one process does."""

from __future__ import annotations

import pytest
import torch

from tests.control.worker import train
from tests.distributed.pairs import Pair
from tests.thinning import thinned

CASES = [
    ("losses", 1, "default"),
    ("trunk", 1, "default"),
    ("features", 1, "default"),
    ("last layer", 1, "default"),
    ("equal", 2, "default"),
    ("trunk", 2, "default"),
    ("losses", 2, "find_unused_parameters"),
    ("equal", 1, "find_unused_parameters"),
    ("trunk", 1, "find_unused_parameters"),
    ("losses", 1, "gradient_as_bucket_view"),
    ("losses", 1, "static_graph"),
    ("trunk", 1, "static_graph"),
]


@pytest.mark.parametrize(("name", "accumulate", "flavour"), thinned(CASES, 6))
def test_two_processes_follow_one(name: str, accumulate: int, flavour: str, pair: Pair) -> None:
    expected = train(name, accumulate)
    first, second = pair.run(train, name, accumulate, flavour)
    assert first["parameters"].equal(second["parameters"])
    assert first["state"] == second["state"]
    assert first["state"]["done"] == ["columns", "masked"]
    # Without collected gradients a task's mean is one of batches, whose shares of the samples differ on the ranks.
    torch.testing.assert_close(first["parameters"], expected["parameters"], rtol=1e-9, atol=1e-9)
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
