"""Two processes that thaw a trunk step by step follow one: what thaws is averaged from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.pairs import run_together
from tests.distributed.worker import RANKS
from tests.finetuning.worker import CASES, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_two_processes_follow_one(tmp_path: Path) -> None:
    results = [tmp_path / f"rank{rank}.pt" for rank in range(RANKS)]
    commands = [
        ["-m", "tests.finetuning.worker", str(rank), str(tmp_path / "rendezvous"), str(result)]
        for rank, result in enumerate(results)
    ]
    run_together(commands, tmp_path, seconds=120)
    first, second = (torch.load(result) for result in results)
    for case in CASES:
        assert torch.equal(first[str(case)], second[str(case)]), f"{case}: the ranks differ"
        torch.testing.assert_close(first[str(case)], train(*case), rtol=1e-6, atol=1e-8, msg=str(case))
