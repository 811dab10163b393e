"""Partial labels on two processes: losses, metrics and fractions are those of one process with all samples."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.distributed import partial_worker
from tests.distributed.pairs import results_of
from tests.distributed.worker import RANKS


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_with_partial_labels_follow_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as background:
        pair = background.submit(results_of, "tests.distributed.partial_worker", tmp_path, RANKS, seconds=120)
        alone = partial_worker.train()
        first, second = pair.result()
    for name, expected in alone.items():
        assert first[name]["parameters"].equal(second[name]["parameters"]), name
        torch.testing.assert_close(first[name]["parameters"], expected["parameters"], rtol=1e-9, atol=1e-9)
        assert first[name]["metrics"] == second[name]["metrics"]
        assert first[name]["metrics"] == pytest.approx(expected["metrics"], rel=1e-5), name
        assert {f"labelled/{task}" for task in ("columns", "classes", "masked", "pixels")} <= expected["metrics"].keys()
    whole = partial_worker.batches(0, 1)
    classes = torch.cat([targets["classes"] for _, targets in whole])
    masked = torch.cat([targets["masked"].labelled for _, targets in whole])
    metrics = alone["equal"]["metrics"]
    assert metrics["labelled/classes"] == pytest.approx(float((classes != -100).double().mean()))
    assert metrics["labelled/masked"] == pytest.approx(float(masked.double().mean()))
