"""What the schemes of physics-informed networks refuse."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from lightning_mtl import Weighting
from lightning_mtl.weighting import (
    CRMOGM,
    MGDA,
    LRAnnealing,
    NTKWeighting,
    ReLoBRaLo,
    Rotating,
    SoftAdapt,
    UncertaintyWeighting,
)
from tests.balanced.models import Physics
from tests.small import batches, small
from tests.training import fit, loader
from tests.weighting.test_physics import data, physics


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SoftAdapt(torch.inf), ValueError, "SoftAdapt(beta=inf) must be finite"),
        (lambda: ReLoBRaLo(1.0), ValueError, "ReLoBRaLo(alpha=1.0) must be at least 0 and below 1"),
        (lambda: ReLoBRaLo(tau=0.0), ValueError, "ReLoBRaLo(tau=0.0) must be above 0"),
        (lambda: ReLoBRaLo(rho=1.5), ValueError, "ReLoBRaLo(rho=1.5) must be between 0 and 1"),
        (lambda: LRAnnealing(0.0), ValueError, "LRAnnealing(alpha=0.0) must be above 0 and at most 1"),
        (lambda: LRAnnealing(at="features"), ValueError, "LRAnnealing(at='features') compares single entries"),  # type: ignore[arg-type]
        (lambda: NTKWeighting(1.0), ValueError, "NTKWeighting(momentum=1.0) must be at least 0 and below 1"),
        (lambda: NTKWeighting(probes=0), ValueError, "NTKWeighting(probes=0) must be at least 1"),
        (
            lambda: Rotating(UncertaintyWeighting()),
            TypeError,
            "Rotating(weighting=UncertaintyWeighting(...)) has no gradients to renew",
        ),
        (lambda: Rotating(MGDA(at="features")), ValueError, "Rotating(weighting=MGDA(at='features')) keeps gradients"),
        (lambda: CRMOGM(Rotating(MGDA())), TypeError, "wrap the other way round: Rotating(CRMOGM(...))"),
    ],
)
def test_arguments(make: Callable[[], Weighting], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_what_a_fit_refuses() -> None:
    with pytest.raises(ValueError, match=r"LRAnnealing\(main='edge'\) is none of the tasks \['residual', 'boundary'"):
        fit(physics(), loader(*data()), callbacks=[LRAnnealing(main="edge")])
    with pytest.raises(ValueError, match=r"differentiates the residuals .* task 'residual' gave none: .*residuals=r"):
        fit(physics(Physics), loader(*data()), callbacks=[NTKWeighting()])
    frozen = small()
    frozen.trunk.requires_grad_(False)
    with pytest.raises(ValueError, match="none of them can be trained; unfreeze some"):
        fit(frozen, loader(*batches(4)), callbacks=[Rotating(MGDA())])
