"""Layers that are measured by a short form where that is cheaper, against rows."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mtl import MultiTaskModule
from lightning_mtl.gradients.compressed import Layer
from lightning_mtl.weighting import GradNorm
from tests.gradients.methods import FromGramian, FromNorms
from tests.small import regressions
from tests.training import Steps, fit, loader

NAMES = tuple("abcdef")
SAMPLES = 8


def wide(**arguments: Any) -> MultiTaskModule:
    """Layers of more inputs than samples, of which each task wants another direction."""
    torch.manual_seed(3)
    trunk = nn.Sequential(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 300), nn.Tanh())
    heads = {name: nn.Linear(300, 1) for name in NAMES}
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    return MultiTaskModule(trunk, heads, regressions(NAMES), optimizer=optimizer, **arguments).double()


def batches(number: int) -> list[Any]:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(draw(SAMPLES, 4), {name: draw(SAMPLES, 1) for name in NAMES}) for _ in range(number)]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks each short form was made for."""
    made: list[int] = []
    rows = Layer.rows

    def counted(layer: Layer, cotangents: Any) -> torch.Tensor:
        made.append(len(cotangents))
        return rows(layer, cotangents)

    monkeypatch.setattr(Layer, "rows", counted)
    return made


@pytest.mark.parametrize("at", ["last_layer", ("trunk.0", "trunk.2")], ids=["last layer", "modules"])
@pytest.mark.parametrize("method", [FromNorms, FromGramian])
def test_a_short_form_is_taken_where_it_is_cheaper_and_trains_alike(method: Any, at: Any, short: list[int]) -> None:
    # Of the first layer, whose inputs are few, rows are kept.
    trained = {}
    for gradients in ("automatic", "rows"):
        model, steps = wide(), Steps()
        fit(model, loader(*batches(3)), callbacks=[method(at=at, gradients=gradients), steps])
        trained[gradients] = [p.detach() for p in model.parameters()], [one.norms for one in steps.signals]
        assert short == [len(NAMES)] * 3
    for found, expected in zip(*trained.values(), strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_rows_are_kept_where_they_add_up(short: list[int]) -> None:
    fit(wide(accumulate_grad_batches=2), loader(*batches(2)), callbacks=[GradNorm()])
    assert not short
