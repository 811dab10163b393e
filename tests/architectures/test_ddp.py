"""Two processes with half of each batch follow one process with all of it, whatever the trunk."""

from __future__ import annotations

import pytest
import torch

from tests.architectures.worker import CASES, train
from tests.distributed.pairs import Pair
from tests.thinning import thinned


@pytest.mark.parametrize(("trunk", "weighting"), thinned(CASES, 3))
def test_two_processes_follow_one(trunk: str, weighting: str, pair: Pair) -> None:
    first, second = pair.run(train, trunk, weighting)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, train(trunk, weighting), rtol=1e-6, atol=1e-8)
