"""Two processes with parts of each batch follow one with all of it, and are the same to the bit."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.pairs import Pair
from tests.learning_rates.worker import CASES, train
from tests.thinning import thinned


@pytest.mark.parametrize("name", thinned(CASES))
def test_two_processes_follow_one(name: str, pair: Pair) -> None:
    expected = train(name)
    first, second = pair.run(train, name)
    for key, value in expected.items():
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, equal_nan=True)
        message = f"{key}: {first[key]}, alone {value}"
        torch.testing.assert_close(first[key], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=message)
    assert len(set(expected["multipliers"].tolist())) > 1
