"""Adam takes a loss weight out of a head's step again, and leaves a learning rate in."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from benchmarks.adam_scale import FACTORS, measure
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from lightning_mtl.weighting import StaticWeights
from tests.learning_rates.by_hand import double_batches, double_small
from tests.training import fit, flat_parameters, loader

OPTIMIZERS: dict[str, Any] = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1),
    "Adam": functools.partial(torch.optim.Adam, lr=0.1, eps=0.0),
}


def first_step(optimizer: str, callback: pl.Callback) -> Tensor:
    module = double_small(optimizer=OPTIMIZERS[optimizer])
    before = flat_parameters(module.heads["a"])
    fit(module, loader(*double_batches(1)), callbacks=[callback])
    return flat_parameters(module.heads["a"]) - before


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize(("optimizer", "weight_counts"), [("SGD", True), ("Adam", False)])
def test_what_scales_a_heads_first_step(optimizer: str, weight_counts: bool, factor: float) -> None:
    plain = first_step(optimizer, StaticWeights())
    weighted = first_step(optimizer, StaticWeights({"a": factor}))
    faster = first_step(optimizer, TaskLearningRate(Importance({"a": factor})))
    torch.testing.assert_close(weighted, plain * (factor if weight_counts else 1.0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(faster, plain * factor, rtol=1e-6, atol=1e-9)


def test_the_guide_has_the_figures_of_the_benchmark() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "learning_rates.md").read_text(encoding="utf-8")
    for name, row in measure(20).items():
        found = re.search(rf"^\| {name} \| (.*) \|$", guide, re.MULTILINE)
        assert found is not None, name
        assert [float(cell) for cell in found[1].split("|")] == pytest.approx(row, abs=0.02), name
    assert FACTORS == (0.1, 1.0, 10.0)
