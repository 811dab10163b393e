"""A task that is learned to the end: weights stay bounded, the others go on, and the user hears of it once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mtl import Weighting
from lightning_mtl.weighting import FAMO, GLS, GradNorm, NashMTL, ScaleInvariant
from tests.contract import ask, course, names, run, signals

FLOORED: list[Callable[..., Weighting]] = [ScaleInvariant, GLS, FAMO]


def weights_at(make: Callable[..., Weighting], smallest: float, **arguments: Any) -> Tensor:
    weighting = make(**arguments)
    weighting.reset(list(names(3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weighting.weigh(signals(torch.tensor([0.5, smallest, 2.0], dtype=torch.float64)))


@pytest.mark.parametrize("make", FLOORED)
def test_a_floor_changes_nothing_above_it_and_bounds_the_weight_below(make: Callable[..., Weighting]) -> None:
    for loss in (1e-3, 0.7):
        assert torch.equal(weights_at(make, loss), weights_at(make, loss, loss_floor=1e-4))
    at_floor = weights_at(make, 1e-4, loss_floor=1e-4)
    for loss in (1e-5, 1e-8, 1e-30):
        assert torch.equal(weights_at(make, loss, loss_floor=1e-4), at_floor)
    assert float(weights_at(make, 1e-30)[1]) <= 1e7 * 1.001
    assert weights_at(make, 0.0).isfinite().all()
    with pytest.raises(ValueError, match=r"loss_floor=0.0\) must be above 0 and finite"):
        make(loss_floor=0.0)


@pytest.mark.parametrize("make", [*FLOORED, NashMTL])
def test_a_weight_that_has_outgrown_the_others_is_said_once(make: Callable[..., Weighting]) -> None:
    weighting = make()
    weighting.reset(list(names(4)))

    def take(step: int, loss: float) -> None:
        rows = torch.eye(4, dtype=torch.float64) * torch.tensor([1.0, loss, 2.0, 3.0])
        ask(weighting, signals(torch.tensor([0.5, loss, 1.0, 2.0]), rows, step=step))

    take(0, 4e-4)
    with pytest.warns(
        UserWarning, match=rf"{make.__name__} gives task 'b' .* the median weight of the others at step 1"
    ):
        take(1, 4e-5)
    take(2, 4e-5)  # a second warning would be an error


def test_gradnorm_says_once_who_stays_at_its_floor() -> None:
    weighting = GradNorm(lr=0.1)
    given = course(3, steps=130, gradient_scale=torch.tensor([1e4, 1.0, 1.0]))
    with pytest.warns(UserWarning, match=r"GradNorm has held the weights of \['a'\] at the lower clamp") as said:
        run(weighting, given, names(3))
    assert len(said) == 1
    assert int(weighting.steps_at_floor[0]) > 100
    run(GradNorm(lr=0.1), course(3, steps=130), names(3))
