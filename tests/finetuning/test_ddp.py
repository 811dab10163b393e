"""Two processes that thaw a trunk step by step follow one: what thaws is averaged from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.pairs import results_of
from tests.distributed.worker import RANKS
from tests.finetuning.worker import CASES, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_processes_follow_one(tmp_path: Path) -> None:
    first, second = results_of("tests.finetuning.worker", tmp_path, RANKS, seconds=120)
    for case in CASES:
        assert torch.equal(first[str(case)], second[str(case)]), f"{case}: the ranks differ"
        torch.testing.assert_close(first[str(case)], train(*case), rtol=1e-6, atol=1e-8, msg=str(case))
