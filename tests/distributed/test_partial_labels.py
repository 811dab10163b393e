"""Partial labels on two processes: losses, metrics and fractions are those of one process with all samples."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.pairs import Pair
from tests.distributed.partial_worker import ACCUMULATE, WEIGHTINGS, batches, train
from tests.thinning import thinned


@pytest.mark.parametrize("name", thinned([*WEIGHTINGS, *ACCUMULATE]))
def test_two_processes_with_partial_labels_follow_one(name: str, pair: Pair) -> None:
    expected = train(name)
    first, second = pair.run(train, name)
    assert first["parameters"].equal(second["parameters"])
    torch.testing.assert_close(first["parameters"], expected["parameters"], rtol=1e-9, atol=1e-9)
    assert first["metrics"] == second["metrics"]
    assert first["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    metrics = expected["metrics"]
    assert {f"labeled/{task}" for task in ("columns", "classes", "masked", "pixels")} <= metrics.keys()
    whole = batches(0, 1)
    classes = torch.cat([targets["classes"] for _, targets in whole])
    masked = torch.cat([targets["masked"].labeled for _, targets in whole])
    assert metrics["labeled/classes"] == pytest.approx(float((classes != -100).double().mean()))
    assert metrics["labeled/masked"] == pytest.approx(float(masked.double().mean()))
