"""Two processes with monitors: what they measure, that it changes nothing, that nobody waits for one that failed."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.pairs import Pair
from tests.monitors.worker import BATCHES, WAYS, monitors, train, train_broken, train_unwatched, train_watched


@pytest.mark.parametrize("way", WAYS)
def test_they_measure_what_one_process_measures_and_change_nothing(way: str, pair: Pair) -> None:
    alone = train(way, monitors())
    first, second = pair.run(train_watched, way)
    unwatched, _ = pair.run(train_unwatched, way)
    assert not any(first["off"] + second["off"])
    assert torch.equal(first["parameters"], unwatched["parameters"])
    for ours, theirs, expected in zip(first["sums"], second["sums"], alone["sums"], strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-5)
        assert expected[1].any()


@pytest.mark.filterwarnings("ignore:.* is turned off, training goes on:UserWarning")
def test_a_monitor_that_fails_on_one_rank_ends_on_all(pair: Pair) -> None:
    watched, _ = pair.run(train_watched, "losses")
    unwatched, _ = pair.run(train_unwatched, "losses")
    for broken in pair.run(train_broken):
        assert broken["steps"] == watched["steps"] <= BATCHES
        assert broken["off"] == [True, True, False]
        assert torch.equal(broken["parameters"], unwatched["parameters"])
        assert torch.equal(broken["sums"][2], watched["sums"][1])
