"""Two processes that hold a shard of each parameter follow one process that holds them whole."""

from __future__ import annotations

import pytest
import torch

from lightning_mtl.training.checks import FSDP2_ON_CPU
from tests.distributed.pairs import Pair
from tests.distributed.sharded_worker import CASES, train
from tests.thinning import thinned

TOLERANCE = 1e-5


pytestmark = pytest.mark.skipif(not FSDP2_ON_CPU, reason="this torch has no FSDP2 on the CPU, which setup refuses")


@pytest.mark.parametrize("name", thinned(CASES))
def test_two_processes_follow_one(name: str, pair: Pair) -> None:
    alone = train(name)
    first, second = pair.run(train, name)
    found = []
    for part in ("parameters", "state"):
        for key, expected in alone[part].items():
            ours, theirs = first[part][key], second[part][key]
            if not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
                found.append(f"the ranks differ in {key}")
            if not torch.allclose(ours.double(), expected.double(), rtol=0, atol=TOLERANCE, equal_nan=True):
                found.append(f"{key} is {(ours - expected).abs().max():.1e} from one process's")
    assert not found, "\n".join(found)
