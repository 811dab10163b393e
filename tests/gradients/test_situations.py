"""Every situation at every place: each parameter's gradient is Σ_k w_k dL_k/dθ, as plain autograd finds it.

The weights are those that were logged. Shared parameters take w_k; all others take w_k where the method weighs heads,
and 1 where it does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from lightning_mtl import Weighting
from tests.gradients.checks import (
    HARMLESS,
    Close,
    Watch,
    check_gradients,
    check_signals,
    first_step,
    parameters_of,
)
from tests.gradients.methods import FromGramianSharedOnly, FromLosses, FromNorms, Method
from tests.gradients.per_task import per_task
from tests.gradients.situations import SITUATIONS
from tests.gradients.situations.base import Situation

pytestmark = [
    *(pytest.mark.filterwarnings(ignored) for ignored in HARMLESS),
    pytest.mark.usefixtures("every_layer"),
]

# What is measured and whether heads are weighed are told apart where the engine takes most ways.
METHODS = {
    "losses": (FromLosses,),
    "trunk": (FromGramianSharedOnly,),
    "features": (FromGramianSharedOnly, FromNorms),
    "last_layer": (FromGramianSharedOnly,),
    "module": (FromNorms,),
}
CASES = [
    pytest.param(
        situation,
        place,
        Method(make),
        id=f"{situation}-{place}-{make.__name__}",
        marks=[pytest.mark.slow] if (place, make) == ("features", FromNorms) else [],
    )
    for situation in SITUATIONS
    for place in ("losses", *situation.places)
    for make in METHODS[place]
]


@pytest.mark.parametrize(("situation", "place", "method"), CASES)
def test_every_parameter_gets_the_weighted_sum(situation: Situation, place: str, method: Method) -> None:
    weighting = method.make() if place == "losses" else method.make(at=situation.at(place))
    watch = first_step(situation, place, weighting)
    if watch is None:
        return
    check_step(situation, place, method, weighting, watch)


def check_step(situation: Situation, place: str, method: Method, weighting: Weighting, watch: Watch) -> None:
    expected = per_task(situation)
    weights = watch.weights_of(0)
    assert list(weights) == list(expected.tasks)
    gradients = expected.weighted(weights, method.heads(weighting, weights))
    if situation.hook is not None:
        gradients = {name: None if g is None else situation.hook(g) for name, g in gradients.items()}
    check_gradients(watch.gradients[0], gradients, situation.tolerance)
    check_buffers(dict(watch.module.named_buffers()), expected.buffers, situation.tolerance)
    like = parameters_of(watch.module)
    if place in ("trunk", "module") or (place == "features" and situation.clean):
        check_signals(watch, weighting, expected, place, like, situation.tolerance)
    if place == "last_layer" and situation.is_last:
        check_signals(watch, weighting, expected, place, like, situation.tolerance)


def check_buffers(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    for name, buffer in expected.items():
        Close(tolerance).check(found[name].to(torch.float64), buffer.to(torch.float64), name)
