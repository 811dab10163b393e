"""Two ranks found by attack to differ from one: empty batches, sparse gradients, features of nested calls."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.pairs import Pair
from tests.gradients.checks import HARMLESS, Close, Watch, check_gradients
from tests.gradients.methods import FromGramian
from tests.gradients.per_task import gradients_of
from tests.gradients.situations.base import WIDTH, Loss, Net, classification, random_inputs, regression, seed_everything
from tests.training import fit, loader

pytestmark = [pytest.mark.filterwarnings(ignored) for ignored in HARMLESS]

PLACES = ("trunk", "features", "last_layer")


def build(make: Any, **arguments: Any) -> Any:
    seed_everything(3)
    return make(**arguments)


class Turns(Net):
    """A batch is inputs with the names of the tasks that have labels; an empty one is not passed through the trunk."""

    def task_losses(self, batch: Any) -> Loss:
        x, names = batch
        return {task: loss for task, loss in self.losses(x).items() if task in names} if names else {}


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(6, WIDTH, sparse=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.table((x[:, 0] > 0).long())))


def on_rank(make: Any, place: str | None, names: tuple[str, ...], rank: int, ranks: int) -> Any:
    watch = Watch()
    callbacks = [watch] if place is None else [watch, FromGramian(at=place)]
    arguments = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "use_distributed_sampler": False}
    fit(build(make), loader((random_inputs(rank), names[rank])), callbacks=callbacks, **arguments)
    return watch.weights_of(0), {k: None if g is None else g.to_dense() for k, g in watch.gradients[0].items()}


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_with_an_empty_batch_where_a_task_is_absent_from_all(place: str, pair: Pair) -> None:
    (weights, found), (_, other) = pair.run(on_rank, Turns, place, ("a", ""))
    expected = gradients_of(functools.partial(build, Turns), (random_inputs(0), "a"), "trunk")
    check_gradients(found, expected.weighted(weights, weights), 1e-12)
    check_gradients(other, found, 0.0)


@pytest.mark.parametrize("place", [None, *PLACES])
def test_sparse_gradients_where_a_rank_lacks_a_task(place: str | None, pair: Pair) -> None:
    make = functools.partial(Turns, trunk=Table)
    (weights, found), (_, other) = pair.run(on_rank, make, place, ("a", "b"))
    for rank, task in enumerate("ab"):
        expected = gradients_of(functools.partial(build, make), (random_inputs(rank), task), "trunk").weighted(
            {task: weights[task]}, {task: weights[task]}
        )
        check_gradients(
            {f"heads.{task}.weight": found[f"heads.{task}.weight"]},
            {f"heads.{task}.weight": expected[f"heads.{task}.weight"]},
            1e-12,
        )
    check_gradients(other, found, 0.0)


class Twice(Turns):
    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(self.trunk(x))
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


def gramian_on_rank(rank: int, ranks: int) -> Any:
    watch = Watch()
    arguments = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", "use_distributed_sampler": False}
    fit(build(Twice), loader((random_inputs(0), "ab")), callbacks=[watch, FromGramian(at="features")], **arguments)
    return watch.signals[0].gramian


def test_features_of_nested_calls_on_two_ranks(pair: Pair) -> None:
    found = pair.run(gramian_on_rank)[0]
    # Each rank's features are orthogonal to the other's.
    Close(1e-12).check(found, gramian_on_rank(0, 1) / 2, "gramian")
