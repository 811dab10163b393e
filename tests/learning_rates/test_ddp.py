"""Two processes with parts of each batch follow one with all of it, and are the same to the bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.distributed.pairs import results_of
from tests.learning_rates.worker import CASES, RANKS, train


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_follow_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as background:
        pair = background.submit(results_of, "tests.learning_rates.worker", tmp_path, RANKS, seconds=180)
        alone = {name: train(name, None) for name in CASES}
        first, second = pair.result()
    for name, expected in alone.items():
        for key, value in expected.items():
            torch.testing.assert_close(first[name][key], second[name][key], rtol=0, atol=0, equal_nan=True)
            message = f"{name}, {key}: {first[name][key]}, alone {value}"
            torch.testing.assert_close(first[name][key], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=message)
        assert len(set(expected["multipliers"].tolist())) > 1, name
