"""The two processes that tests train on: what they give back, what they say of an error, that nothing stays behind."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.pairs import RANKS, Pair


def total(number: int, rank: int, ranks: int) -> tuple[int, float]:
    tensor = torch.full((1,), float(number + rank))
    dist.all_reduce(tensor)
    os.environ["LEFT_BEHIND"] = str(rank)
    return ranks, float(tensor)


def leftover(rank: int, ranks: int) -> str | None:
    assert dist.is_initialized()
    return os.environ.get("LEFT_BEHIND")


def warns(rank: int, ranks: int) -> None:
    warnings.warn("on purpose", UserWarning, stacklevel=1)


def breaks(rank: int, ranks: int) -> None:
    """The second rank fails, the first one waits for it forever."""
    if rank == 1:
        raise ValueError("on purpose")
    while True:
        pass


def test_ranks_meet_anew_in_every_call(pair: Pair) -> None:
    for number in (1, 2):
        assert pair.run(total, number) == [(RANKS, 2 * number + 1)] * RANKS
    assert pair.run(leftover) == [None, None]


@pytest.mark.filterwarnings("ignore:on purpose:UserWarning")
def test_the_filters_of_a_test_hold_on_the_ranks(pair: Pair) -> None:
    assert pair.run(warns) == [None, None]


@pytest.mark.slow
def test_an_error_is_told_with_the_place_of_each_rank_and_the_next_call_works(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with pytest.raises(AssertionError, match="on purpose") as failed:
        pair.run(breaks)
    assert "in breaks" in str(failed.value).partition("--- rank 1")[0]  # where the first rank hangs
    with pytest.raises(AssertionError, match="UserWarning: on purpose"):  # an error, as in every test
        pair.run(warns)
    assert pair.run(leftover) == [None, None]
    pair.close()
