"""Two processes with half a batch each follow one with the whole, to the bit the same on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.architectures.experts_worker import CASES, RANKS, train
from tests.distributed.pairs import results_of


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_follow_one(tmp_path: Path) -> None:
    first, second = results_of("tests.architectures.experts_worker", tmp_path, RANKS, seconds=120)
    for case in CASES:
        assert first[case]["parameters"].equal(second[case]["parameters"]), case
        alone = train(*case, rank=0, ranks=1)
        torch.testing.assert_close(first[case], alone, rtol=1e-5, atol=1e-5, equal_nan=True)
