"""Parameters that no rank reaches in a step stay where they are, and penalties may differ between the ranks."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.pairs import Pair
from tests.distributed.unused_worker import NOW_AND_THEN, WEIGHTINGS, now_and_then, penalize, route
from tests.thinning import thinned


@pytest.mark.parametrize("accumulate", thinned([1, 2, 3]))
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_parts_that_are_used_now_and_then(name: str, accumulate: int, pair: Pair) -> None:
    first, second = pair.run(route, name, "find_unused_parameters", accumulate)
    for one, other, expected in zip(first, second, route(name, "find_unused_parameters", accumulate), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("strategy", "every"), [("default", 1), ("find_unused_parameters", 2)])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_penalties_that_one_rank_alone_has(name: str, strategy: str, every: int, pair: Pair) -> None:
    first, second = pair.run(penalize, name, strategy, every)
    for one, other, expected in zip(first, second, penalize(name, strategy, every), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NOW_AND_THEN)
def test_a_static_graph_of_a_method_that_measures_now_and_then(name: str, pair: Pair) -> None:
    first, second = pair.run(now_and_then, name)
    for one, other, expected in zip(first, second, now_and_then(name), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)
