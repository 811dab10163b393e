"""Gramians without rows on two processes: layers' inputs and output gradients gathered, tasks absent, parts unused."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from lightning_mtl.gradients import gathered, trunk_gramian
from lightning_mtl.gradients.gathered import GatheredGramian
from tests.distributed.pairs import Pair
from tests.distributed.table import cases
from tests.distributed.test_ddp import alone, complaints
from tests.distributed.worker import train

pytestmark = pytest.mark.filterwarnings("ignore:Step \\d+ is skipped:UserWarning")
# NashMTL's weights tell a Gramian from a multiple of it. In the batches each rank lacks each task in turn; losses are
# counted and not; a gradient is not finite; parts of the trunk are unused.
NAMES = ("NashMTL", "rows, uncounted", "rows, gradient not finite", "rows, a branch a task")
LAYER = "layer, uncounted"


def train_gathering(rank: int, ranks: int) -> dict[str, Any]:
    """The cases, every layer compressed however small it is; and how many layers were gathered in all."""
    counted: list[int] = []

    def counting(self: GatheredGramian) -> None:
        counted.append(len(self._parts))
        gather(self)

    gather = GatheredGramian._gather
    with (
        patch.object(gathered.GatheredGramian, "_travels_lightly", lambda *_: True),
        patch.object(GatheredGramian, "_gather", counting),
    ):
        found = {name: train(cases("default")[name], "default", rank) for name in NAMES}
    return {**found, "gathered": sum(counted)}


def test_two_processes_that_gather_follow_one(pair: Pair) -> None:
    ranks = pair.run(train_gathering)
    assert ranks[0]["gathered"] == ranks[1]["gathered"] >= 50
    for name in NAMES:
        found = [*complaints(cases("default")[name], [rank[name] for rank in ranks], alone(name))]
        assert not found, "\n".join([name, *found])


def train_at_a_layer(rank: int, ranks: int) -> dict[str, Any]:
    """GradNorm at the last layer, whose short form is worth it at any size."""
    with patch.object(trunk_gramian, "is_worth_it", lambda *_, **__: True):
        return train(cases("default")[LAYER], "default", rank)


def test_short_forms_of_one_layer_are_not_added_over_ranks(pair: Pair) -> None:
    found = pair.run(train_at_a_layer)
    assert not (lines := list(complaints(cases("default")[LAYER], found, alone(LAYER)))), "\n".join(lines)
