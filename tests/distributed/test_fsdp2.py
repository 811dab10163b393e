"""Two processes that hold a shard of each parameter follow one process that holds them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.pairs import run_together
from tests.distributed.sharded_worker import CASES, RANKS, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TOLERANCE = 1e-5
SECONDS = 240  # a tenth would do on an idle machine


def test_two_processes_follow_one(tmp_path: Path) -> None:
    results = [tmp_path / f"rank{rank}.pt" for rank in range(RANKS)]
    run_together(
        [
            ["-m", "tests.distributed.sharded_worker", str(rank), str(tmp_path / "rendezvous"), str(result)]
            for rank, result in enumerate(results)
        ],
        tmp_path,
        SECONDS,
    )
    first, second = (torch.load(result) for result in results)
    found = []
    for name in CASES:
        alone = train(name)
        for part in ("parameters", "state"):
            for key, expected in alone[part].items():
                ours, theirs = first[name][part][key], second[name][part][key]
                if not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
                    found.append(f"{name}: the ranks differ in {key}")
                if not torch.allclose(ours.double(), expected.double(), rtol=0, atol=TOLERANCE, equal_nan=True):
                    found.append(f"{name}: {key} is {(ours - expected).abs().max():.1e} from one process's")
    assert not found, "\n".join(found)
