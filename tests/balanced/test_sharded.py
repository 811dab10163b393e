"""Two processes that hold a shard of each parameter train a module without a trunk as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mtl.training.checks import FSDP2_ON_CPU
from tests.balanced.sharded_worker import CASES, evaluate, train
from tests.distributed.pairs import Pair
from tests.thinning import thinned

pytestmark = pytest.mark.skipif(not FSDP2_ON_CPU, reason="this torch has no FSDP2 on the CPU, which setup refuses")


def assert_same(ours: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-9) -> None:
    assert ours["known"] == expected["known"]
    for part in ("parameters", "state", "metrics"):
        assert ours[part].keys() == expected[part].keys()
        for key, value in expected[part].items():
            torch.testing.assert_close(ours[part][key], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=key)


@pytest.mark.parametrize("automatic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", thinned([name for name in CASES if name != "kernels"], 4))
def test_two_processes_follow_one(name: str, automatic: bool, pair: Pair) -> None:
    alone = train(name, automatic)
    first, second = pair.run(train, name, automatic, None, None, "fsdp2")
    assert_same(first, second, 0.0)
    assert_same(first, alone)


# What DDP says to gradients of second derivatives in plain training, too.
@pytest.mark.filterwarnings("ignore:Grad strides do not match:UserWarning")
@pytest.mark.slow
def test_random_probes_are_those_of_ddp(pair: Pair) -> None:
    # One process would draw other ones.
    first, second = pair.run(train, "kernels", False, None, None, "fsdp2")
    assert_same(first, second, 0.0)
    assert_same(first, pair.run(train, "kernels", False, None, None, "ddp_find_unused_parameters_true")[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MGDA", "said, accumulated"])
def test_resuming_goes_on_as_if_nothing_had_happened(name: str, pair: Pair, tmp_path: Path) -> None:
    whole, _ = pair.run(train, name, False, None, None, "fsdp2")
    pair.run(train, name, False, tmp_path / "stop", None, "fsdp2")
    resumed, _ = pair.run(train, name, False, None, tmp_path / "stop", "fsdp2")
    assert_same(resumed, whole)


@pytest.mark.slow
def test_a_module_that_was_never_trained_is_validated_with_derivatives(pair: Pair) -> None:
    [expected], ([found], _) = evaluate(), pair.run(evaluate)
    assert found == pytest.approx(expected)
