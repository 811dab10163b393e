"""Random models: graphs of trunk calls and heads that nobody thought of, at every place."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mtl import MultiTaskModule, Task
from tests.gradients.checks import HARMLESS, Close, check_gradients, check_signals, parameters_of, train
from tests.gradients.methods import (
    FromGramian,
    FromGramianSharedOnly,
    FromNorms,
    FromNormsSharedOnly,
    Method,
    OwnHeads,
)
from tests.gradients.per_task import PerTask, gradients_of
from tests.gradients.situations.base import PLACES, WIDTH, random_inputs, seed_everything
from tests.thinning import thinned

pytestmark = [
    *(pytest.mark.filterwarnings(ignored) for ignored in HARMLESS),
    pytest.mark.usefixtures("every_layer"),
]

# Models whose heads read what trunk.forward or a part of the trunk returned, and no output that a hook sees.
NO_FEATURES = {3, 9, 18, 21, 23, 28, 30, 35, 42}
METHODS = (FromGramian, FromGramianSharedOnly, FromNorms, FromNormsSharedOnly, OwnHeads)


class RandomTrunk(nn.Module):
    """Some layers; it keeps its hidden activations."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.hidden: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = []
        for layer in self.layers:
            x = layer(x).tanh()
            self.hidden.append(x)
        return x


class RandomModel(MultiTaskModule):
    """Draws a graph of tensors: calls of the trunk, of a decoder and sums, then losses with terms from anywhere.

    Args:
        seed: What the graph is drawn from; the same in each call.
        arguments: Those of :class:`MultiTaskModule`.
    """

    def __init__(self, seed: int, **arguments: Any) -> None:
        draw = random.Random(seed)
        tasks = "abc"[: draw.randint(1, 3)]
        heads: dict[str, nn.Module] = {task: nn.Linear(WIDTH, WIDTH) for task in tasks}
        if len(tasks) > 1 and draw.random() < 0.3:
            layer = nn.Linear(WIDTH, WIDTH)
            heads["a"], heads["b"] = nn.Sequential(layer, nn.Linear(WIDTH, WIDTH)), layer
        descent = functools.partial(torch.optim.SGD, lr=0.0)
        trunk, declared = RandomTrunk(draw.randint(1, 3)), {task: Task(F.mse_loss) for task in tasks}
        super().__init__(trunk, heads, declared, optimizer=descent, **arguments)
        self.seed = seed
        self.decoder, self.prompt = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))
        self.double()

    def task_losses(self, batch: Tensor) -> dict[str, Tensor]:
        draw = random.Random(self.seed + 1000)
        tensors, inside = self._graph(batch, draw)
        losses: dict[str, Tensor] = {}
        for task, head in self.heads.items():
            if draw.random() < 0.1 and losses:
                losses[task] = torch.tensor(0.3, dtype=batch.dtype)  # constant in this batch
                continue
            own = draw.choice(tensors)
            own = own.detach() if draw.random() < 0.1 else own
            prediction = head(own)
            if draw.random() < 0.25:
                tensors.append(prediction)  # a later head may read this one's prediction
            losses[task] = F.mse_loss(prediction, batch) + self._terms(draw, own, prediction, inside)
        self.penalized = draw.choice([*inside, tensors[-1]]) if draw.random() < 0.3 else None
        return losses

    def penalties(self) -> dict[str, Tensor]:
        return {} if self.penalized is None else {"activity": self.penalized.pow(2).mean()}

    def _graph(self, x: Tensor, draw: random.Random) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors that heads may read, and hidden activations of the trunk."""
        first = x * self.prompt if draw.random() < 0.2 else x
        tensors, inside = [self.trunk(first)], list(self._hidden())
        for _ in range(draw.randint(0, 4)):
            source = draw.choice([x, *tensors])
            kind = draw.choice(["trunk", "trunk", "trunk.forward", "decoder", "sum", "layer", "detached"])
            if kind == "trunk":
                tensors.append(self.trunk(source))
                inside += self._hidden()
            elif kind == "trunk.forward":
                tensors.append(self.trunk.forward(source))
            elif kind == "decoder":
                tensors.append(self.decoder(source).tanh())
            elif kind == "sum":
                tensors.append(source + draw.choice(tensors))
            elif kind == "layer":
                tensors.append(self.trunk.get_submodule("layers.0")(source).tanh())
            else:
                tensors.append(self.trunk(source.detach()))
        return tensors, inside

    def _hidden(self) -> list[Tensor]:
        assert isinstance(self.trunk, RandomTrunk)
        return self.trunk.hidden[:-1]

    def _terms(self, draw: random.Random, own: Tensor, prediction: Tensor, inside: list[Tensor]) -> Tensor:
        """Further terms of a loss: hidden activations, features, parameters, derivatives."""
        total = prediction.new_zeros(())
        if inside and draw.random() < 0.3:
            total = total + draw.choice(inside).pow(2).mean()
        if draw.random() < 0.2:
            total = total + own.abs().mean()
        if draw.random() < 0.15:
            total = total + 0.1 * next(self.trunk.parameters()).pow(2).sum()
        if own.requires_grad and draw.random() < 0.2:
            (slope,) = torch.autograd.grad(prediction.tanh().sum(), own, create_graph=True)
            total = total + slope.pow(2).mean()
        return total


def build(seed: int) -> RandomModel:
    seed_everything(seed)
    return RandomModel(seed)


def last_layer(seed: int) -> str:
    trunk = build(seed).trunk
    assert isinstance(trunk, RandomTrunk)
    return f"trunk.layers.{len(trunk.layers) - 1}"


@functools.cache
def expected_of(seed: int) -> PerTask:
    return gradients_of(functools.partial(build, seed), random_inputs(seed), last_layer(seed))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("seed", thinned(range(60)))
def test_a_random_model_gets_the_weighted_sum(seed: int, place: str) -> None:
    method = Method(METHODS[(seed + PLACES.index(place)) % len(METHODS)])
    weighting = method.make(at=(last_layer(seed),) if place == "module" else place)
    if place == "features" and seed in NO_FEATURES:
        with pytest.raises(ValueError, match="No loss reads an output of the trunk"):
            train(build(seed), [random_inputs(seed)], weighting)
        return
    watch = train(build(seed), [random_inputs(seed)], weighting)
    expected = expected_of(seed)
    weights = watch.weights_of(0)
    assert list(weights) == list(expected.tasks)
    check_gradients(watch.gradients[0], expected.weighted(weights, method.heads(weighting, weights)), 1e-11)
    if place in ("trunk", "module"):
        check_signals(watch, weighting, expected, place, parameters_of(watch.module), 1e-11)


def test_the_models_differ_in_what_they_use() -> None:
    """The draws cover what they are meant to: several calls, tasks without the trunk, unused parameters."""
    found = [expected_of(seed) for seed in range(60)]
    rows = [expected.gramian("trunk", parameters_of(build(seed))) for seed, expected in enumerate(found)]
    assert any(bool((row.diagonal() == 0).any()) for row in rows), "some task has a zero row"
    assert any(expected.penalty["trunk.layers.0.weight"] is not None for expected in found)
    unused = [all(own["decoder.weight"] is None for own in expected.tasks.values()) for expected in found]
    assert any(unused)
    assert not all(unused)
    same = gradients_of(functools.partial(build, 7), random_inputs(7), last_layer(7))
    for name, gradient in same.weighted(dict.fromkeys("abc", 1.0), dict.fromkeys("abc", 1.0)).items():
        again = expected_of(7).weighted(dict.fromkeys("abc", 1.0), dict.fromkeys("abc", 1.0))[name]
        if gradient is not None:
            assert again is not None
            Close(0).check(gradient, again, name)
