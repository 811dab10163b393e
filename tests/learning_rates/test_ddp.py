"""Two processes with parts of each batch follow one with all of it, and are the same to the bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.distributed.pairs import run_together
from tests.learning_rates.worker import CASES, RANKS, train


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_follow_one(tmp_path: Path) -> None:
    results = [tmp_path / f"rank{rank}.pt" for rank in range(RANKS)]
    commands = [
        ["-m", "tests.learning_rates.worker", str(rank), str(tmp_path / "rendezvous"), str(result)]
        for rank, result in enumerate(results)
    ]
    with ThreadPoolExecutor(1) as background:
        pair = background.submit(run_together, commands, tmp_path, 180)
        alone = {name: train(name, None) for name in CASES}
        pair.result()
    first, second = (torch.load(result) for result in results)
    for name, expected in alone.items():
        for key, value in expected.items():
            torch.testing.assert_close(first[name][key], second[name][key], rtol=0, atol=0, equal_nan=True)
            message = f"{name}, {key}: {first[name][key]}, alone {value}"
            torch.testing.assert_close(first[name][key], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=message)
        assert len(set(expected["multipliers"].tolist())) > 1, name
