"""Two processes that unfreeze a trunk step by step follow one: what is unfrozen is averaged from then on."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.pairs import Pair
from tests.finetuning.worker import CASES, train
from tests.thinning import thinned


@pytest.mark.parametrize(("flavor", "weighting", "automatic"), thinned(CASES))
def test_two_processes_follow_one(flavor: str, weighting: str, automatic: bool, pair: Pair) -> None:
    first, second = pair.run(train, flavor, weighting, automatic)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, train(flavor, weighting, automatic), rtol=1e-6, atol=1e-8)
