"""Low precision: monitors see unscaled gradients and parameters as they are at each trial step, and change no bit."""

from __future__ import annotations

import functools

import pytest
import torch

from lightning_mtl.monitors import TaskAffinity
from tests.monitors.watched import every_monitor
from tests.small import batches, small
from tests.test_precision import PRECISIONS
from tests.training import fit, flat_parameters, loader

# Digits that a precision leaves of an affinity: the step, the losses and the gradients are rounded.
TOLERANCES = {"16-mixed": 0.03, "bf16-mixed": 0.3, "bf16-true": 0.6, "32": 1e-4, "64": 1e-6}
LR = 0.3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_affinities_are_those_of_double_precision_and_nothing_changes(precision: str) -> None:
    sgd = functools.partial(torch.optim.SGD, lr=LR)
    data = loader(*batches(16, 16, 16))
    monitors, exact = every_monitor(names=("trunk.0",)), TaskAffinity(1, exact=True, figure=False, name="double")
    watched, unwatched = small(optimizer=sgd), small(optimizer=sgd)
    fit(watched, data, callbacks=monitors, plugins=[PRECISIONS[precision]()])
    fit(unwatched, data, plugins=[PRECISIONS[precision]()])
    assert torch.equal(flat_parameters(watched), flat_parameters(unwatched))
    fit(small(optimizer=sgd), data, callbacks=[exact], plugins=[PRECISIONS["64"]()])
    (found,) = (m for m in monitors if isinstance(m, TaskAffinity) and m.looks_ahead)
    error = (found.affinity - exact.affinity).abs().max() / exact.affinity.abs().max()
    assert error < TOLERANCES[precision]
