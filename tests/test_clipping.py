"""Clipping in manual optimization against Lightning's in automatic."""

from __future__ import annotations

import pytest
import torch

from tests.automatic import WAYS, Run, assert_same_history, automatic_and_manual


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("algorithm", "value"), [("norm", 0.1), ("norm", 1e3), ("value", 0.02)])
def test_as_automatic_optimization_clips(way: str, algorithm: str, value: float) -> None:
    assert_same_history(Run(way=way, clip=value, algorithm=algorithm))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_with_accumulation(way: str, algorithm: str) -> None:
    assert_same_history(Run(way=way, clip=0.05, algorithm=algorithm, accumulate=2))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_tight_clip_changes_the_training(algorithm: str) -> None:
    _, free = automatic_and_manual(Run())
    _, clipped = automatic_and_manual(Run(clip=0.05, algorithm=algorithm))
    assert not torch.allclose(free.parameters[0], clipped.parameters[0], atol=1e-3)
