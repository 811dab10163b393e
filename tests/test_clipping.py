"""Clipping in manual optimization against Lightning's in automatic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task
from tests.automatic import WAYS, Run, assert_same_history, automatic_and_manual
from tests.training import fit, loader


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("algorithm", "value"), [("norm", 0.1), ("norm", 1e3), ("value", 0.02)])
def test_as_automatic_optimization_clips(way: str, algorithm: str, value: float) -> None:
    assert_same_history(Run(way=way, clip=value, algorithm=algorithm))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_with_accumulation(way: str, algorithm: str) -> None:
    assert_same_history(Run(way=way, clip=0.05, algorithm=algorithm, accumulate=2))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_tight_clip_changes_the_training(algorithm: str) -> None:
    _, free = automatic_and_manual(Run())
    _, clipped = automatic_and_manual(Run(clip=0.05, algorithm=algorithm))
    assert not torch.allclose(free.parameters[0], clipped.parameters[0], atol=1e-3)


class Automatic(MultiTaskModule):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.automatic_optimization = True


NOTHING = {
    "no labels": {},
    "None for labels": {"a": None},
    "missing labels": {"a": torch.full((4, 1), torch.nan)},
    "gradients that are not finite": {"a": torch.full((4, 1), torch.inf)},
}


@pytest.mark.filterwarnings("ignore:Step . is skipped", "ignore:`training_step` returned `None`")
@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("labels", NOTHING.values(), ids=NOTHING)
def test_a_step_without_gradients_has_nothing_to_clip(labels: dict[str, Any], algorithm: str, automatic: bool) -> None:
    clip = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": algorithm}
    parts: Any = nn.Linear(3, 3), {"a": nn.Linear(3, 1)}, {"a": Task(mse_loss, missing=torch.nan)}
    module = Automatic(*parts) if automatic else MultiTaskModule(*parts, **clip)  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in module.parameters()]
    nothing, something = (torch.ones(4, 3), labels), (torch.ones(4, 3), {"a": torch.ones(4, 1)})
    fit(module, loader(nothing), **(clip if automatic else {}))
    assert all(torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))
    fit(module, loader(nothing, something), **(clip if automatic else {}))
    assert not all(torch.equal(one, other) for one, other in zip(before, module.parameters(), strict=True))
