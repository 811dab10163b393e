"""Two processes with half of each batch follow one process with all of it, whatever the trunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.architectures.worker import CASES, train
from tests.distributed.pairs import results_of
from tests.distributed.worker import RANKS

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_processes_follow_one(tmp_path: Path) -> None:
    first, second = results_of("tests.architectures.worker", tmp_path, RANKS, seconds=120)
    for case in CASES:
        name = " / ".join(case)
        assert torch.equal(first[name], second[name]), f"{name}: the ranks differ"
        torch.testing.assert_close(first[name], train(*case), rtol=1e-6, atol=1e-8, msg=name)
