"""Half precision for losses that differentiate the model: each step beside the same precision's gradients by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from lightning_mtl.weighting import MGDA, GradNorm, UncertaintyWeighting
from tests.balanced.by_hand import LR, ByHand
from tests.balanced.models import MODELS, points
from tests.test_precision import PRECISIONS
from tests.training import Steps, fit, loader

METHODS: dict[str, Any] = {
    "MGDA": MGDA,
    "by rows": lambda: MGDA(gradients="rows"),
    "losses": UncertaintyWeighting,
    "norms": lambda: GradNorm(at="trunk"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
}


@pytest.mark.parametrize("setting", ["plain", pytest.param("accumulated and clipped", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["MGDA", *(pytest.param(m, marks=pytest.mark.slow) for m in list(METHODS)[1:])])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("name", ["Physics", pytest.param("Forces", marks=pytest.mark.slow)])
def test_a_step(name: str, precision: str, method: str, setting: str) -> None:
    torch.manual_seed(1)
    arguments = SETTINGS[setting]
    module, weighting, steps = MODELS[name](**arguments), METHODS[method](), Steps()
    module._make_optimizer = functools.partial(torch.optim.SGD, lr=LR)
    size, clip = arguments.get("accumulate_grad_batches", 1), arguments.get("gradient_clip_val")
    # Sums in another order, of numbers with eleven bits or eight.
    by_hand = ByHand(weighting, steps, size, clip, tolerance=2e-3 if precision == "16-mixed" else 1e-2)
    given = [points(name, seed=seed).float() for seed in range(4)]
    fit(module, loader(*given), callbacks=[weighting, steps, by_hand], plugins=[PRECISIONS[precision]()])
    assert by_hand.compared == len(given) // size
