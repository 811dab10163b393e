"""GradNorm's toy: two tasks whose targets differ in scale by 100, and the small one not drowned by the large one.

f_k(x) = σ_k tanh((B + ε_k) x) with B ~ N(0, 10) and ε_k ~ N(0, 3.5), taken as standard deviations, x uniform on the
unit sphere, a four-layer ReLU trunk 100 wide, one affine head a task, squared loss, Adam 1e-3, α = 0.12. Inputs and
outputs have 10 dimensions instead of the paper's 250 and 100, so that a few hundred steps suffice.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.weighting import GradNorm
from tests.training import Steps, fit, loader

INPUTS, OUTPUTS, BATCH, STEPS = 10, 10, 100, 400
SCALES = {"small": 1.0, "large": 100.0}


def toy() -> tuple[MultiTaskModule, list[Any], Any]:
    """The model, its training batches and a test batch; the same at every call."""
    torch.manual_seed(0)
    base = 10 * torch.randn(OUTPUTS, INPUTS)
    own = {task: base + 3.5 * torch.randn(OUTPUTS, INPUTS) for task in SCALES}

    def draw(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = normalize(torch.randn(number, INPUTS), dim=1)
        return x, {task: scale * torch.tanh(x @ own[task].T) for task, scale in SCALES.items()}

    layers: list[nn.Module] = []
    for width in (INPUTS, 100, 100, 100):
        layers += [nn.Linear(width, 100), nn.ReLU()]
    module = MultiTaskModule(
        nn.Sequential(*layers),
        {task: nn.Linear(100, OUTPUTS) for task in SCALES},
        {task: Task(mse_loss) for task in SCALES},
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3),
    )
    data = [draw(BATCH) for _ in range(STEPS)]
    return module, data, draw(400)


def losses(module: MultiTaskModule, given: Any) -> dict[str, float]:
    with torch.no_grad():
        return {task: output.loss.item() for task, output in module.present_outputs(given).items()}


def normalised(weighting: Weighting | None) -> tuple[dict[str, float], Steps]:
    """L_k(end) / L_k(0) on test data."""
    module, data, test = toy()
    before, steps = losses(module, test), Steps()
    fit(module, loader(*data), callbacks=[steps, *([] if weighting is None else [weighting])])
    return {task: after / before[task] for task, after in losses(module, test).items()}, steps


def test_gradnorm_keeps_the_small_task_from_drowning() -> None:
    equal, _ = normalised(None)
    balanced, steps = normalised(GradNorm(alpha=0.12))
    weights = steps.weights[-1]
    assert weights is not None
    assert float(weights[0]) > 1.5 > 0.5 > float(weights[1])
    assert balanced["small"] < 0.8 * equal["small"]
    assert sum(balanced.values()) < 0.9 * sum(equal.values())
    assert weights.sum() == pytest.approx(2.0, rel=1e-5)
