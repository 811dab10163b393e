"""Resumed on another number of processes: the batches of the uninterrupted training, and its numbers to 1e-5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pairs import Pair
from tests.loaders.rank_worker import CASES, SAVE_AFTER, run

# The same batches on one process as on two, which a training in Proportional mode has.
MAKE = CASES["temperature"]

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


def save_on_rank(path: Path, rank: int, ranks: int) -> dict[str, Any]:
    return run(MAKE, ranks, save_after=SAVE_AFTER, path=path)


def resume_on_rank(path: Path, rank: int, ranks: int) -> dict[str, Any]:
    return run(MAKE, ranks, ckpt=path)


def test_from_one_process_to_two(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    whole = run(MAKE, 1, save_after=SAVE_AFTER, path=path)
    first, second = pair.run(resume_on_rank, path)
    torch.testing.assert_close(first["parameters"], whole["parameters"], rtol=0, atol=1e-5)
    assert torch.equal(first["parameters"], second["parameters"])


def test_from_two_processes_to_one(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    whole, _ = pair.run(save_on_rank, path)
    resumed = run(MAKE, 1, ckpt=path)
    torch.testing.assert_close(resumed["parameters"], whole["parameters"], rtol=0, atol=1e-5)
