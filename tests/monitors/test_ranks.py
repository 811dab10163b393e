"""Two processes with monitors: what they measure, that it changes nothing, that nobody waits for one that failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.pairs import run_together
from tests.monitors.worker import BATCHES, RANKS, WAYS, monitors, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    results = [folder / f"rank{rank}.pt" for rank in range(RANKS)]
    commands = [
        ["-m", "tests.monitors.worker", str(rank), str(Path(folder, "rendezvous")), str(result)]
        for rank, result in enumerate(results)
    ]
    run_together(commands, folder, 120)
    return [torch.load(result) for result in results]


@pytest.mark.parametrize("way", WAYS)
def test_they_measure_what_one_process_measures_and_change_nothing(way: str, ranks: list[dict[str, Any]]) -> None:
    alone = train(way, monitors())
    first, second = (rank[way] for rank in ranks)
    assert not any(first["off"] + second["off"])
    assert torch.equal(first["parameters"], ranks[0][f"{way}, unwatched"]["parameters"])
    for ours, theirs, expected in zip(first["sums"], second["sums"], alone["sums"], strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-5)
        assert expected[1].any()


def test_a_monitor_that_fails_on_one_rank_ends_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        broken = rank["broken"]
        assert broken["steps"] == ranks[0]["losses"]["steps"] <= BATCHES
        assert broken["off"] == [True, True, False]
        assert torch.equal(broken["parameters"], ranks[0]["losses, unwatched"]["parameters"])
        assert torch.equal(broken["sums"][2], ranks[0]["losses"]["sums"][1])
