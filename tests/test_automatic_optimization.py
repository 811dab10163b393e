"""Lightning may run the backward pass itself, with every flag of its Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_mtl import MultiTaskModule
from lightning_mtl.weighting import DWA, GLS, MGDA, GradNorm, UncertaintyWeighting
from tests.small import batches, small
from tests.training import History, fit, loader
from tests.weightings import WeightedSum, fixed

WEIGHTS = {"a": 2.0, "b": 0.25}
METHODS: dict[str, Any] = {
    "equal": lambda: None,
    "losses": lambda: fixed(WEIGHTS, "losses"),
    "features": lambda: fixed(WEIGHTS, "gramian", at="features", weighs_heads=False),
    "rows": lambda: fixed(WEIGHTS, "gramian", weighs_heads=False),
    "aggregated rows": lambda: WeightedSum(WEIGHTS),
    "from the losses": GLS,
    "learned": lambda: UncertaintyWeighting(lr=0.1),
    "epochs": DWA,
    "GradNorm": lambda: GradNorm(lr=0.1),
    "MGDA-UB": lambda: MGDA(at="features"),
    "MGDA": MGDA,
}


def history(module: MultiTaskModule, name: str, **arguments: Any) -> torch.Tensor:
    found, weighting = History(), METHODS[name]()
    callbacks = [found] if weighting is None else [found, weighting]
    fit(module, loader(*batches(4, 4, 2, 3, 4)), max_epochs=3, callbacks=callbacks, **arguments)
    return torch.stack(found.parameters)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.1)])
def test_as_manual_optimization(name: str, accumulate: int, clip: float | None) -> None:
    manual = small(optimizer=sgd, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    automatic = small(optimizer=sgd)
    automatic.automatic_optimization = True
    expected = history(manual, name)
    found = history(automatic, name, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
