"""Two processes with half a batch each follow one with the whole, to the bit the same on both."""

from __future__ import annotations

import pytest
import torch

from tests.architectures.experts_worker import CASES, train
from tests.distributed.pairs import Pair
from tests.thinning import thinned


@pytest.mark.parametrize(("kind", "weighting"), thinned(CASES))
def test_two_processes_follow_one(kind: str, weighting: str, pair: Pair) -> None:
    first, second = pair.run(train, kind, weighting)
    assert first["parameters"].equal(second["parameters"])
    torch.testing.assert_close(first, train(kind, weighting, 0, 1), rtol=1e-5, atol=1e-5, equal_nan=True)
