"""Two ranks train a module without a trunk as one process does, and know the same of what tasks share."""

from __future__ import annotations

import pytest
import torch

from tests.balanced.worker import WEIGHTINGS, train
from tests.distributed.pairs import Pair


# What DDP says to gradients of second derivatives in plain training, too.
@pytest.mark.filterwarnings("ignore:Grad strides do not match:UserWarning")
@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_two_ranks_follow_one_process(name: str, accumulate: int, pair: Pair) -> None:
    (first, known), (second, other) = pair.run(train, name, accumulate)
    expected, alone = train(name, accumulate)
    assert torch.equal(first, second)
    assert known == other == alone
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-9)
