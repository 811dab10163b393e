"""Adding every monitor changes no bit of a training, whatever weighs the tasks."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from lightning_mtl import Monitor, Weighting
from lightning_mtl.monitors import GradientConflict, TaskAffinity
from lightning_mtl.weighting import (
    DWA,
    FAMO,
    MGDA,
    GradDrop,
    GradientNormBalance,
    GradNorm,
    PCGrad,
    UncertaintyWeighting,
)
from tests.monitors.watched import TASKS, batches, every_monitor, module
from tests.training import Memory, Steps, fit, loader
from tests.weightings import WeightedSum, fixed

UNLIKE = {"kind": 1.0, "size": 2.0, "pose": 0.5}
KINDS: Mapping[str, Callable[[], Weighting | None]] = {
    "none": lambda: None,
    "losses": UncertaintyWeighting,
    "losses of an epoch": DWA,
    "losses again": FAMO,
    "weights of the trunk alone": lambda: fixed(UNLIKE, "losses", weighs_heads=False),
    "norms of a layer": GradNorm,
    "norms at the trunk": GradientNormBalance,
    "features": lambda: MGDA(at="features"),
    "rows": MGDA,
    "rows now and then": lambda: MGDA(every_n_steps=2),
    "rows, by chance": PCGrad,
    "features now and then": lambda: MGDA(at="features", every_n_steps=3),
    "aggregator": GradDrop,
    "aggregated features": lambda: WeightedSum(UNLIKE, at="features"),
}


def train(weighting: Weighting | None, monitors: list[Monitor], **arguments: Any) -> dict[str, Any]:
    """Everything that a training leaves behind."""
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the state that others draw from
    automatic = arguments.pop("automatic", False)
    watched = module(**arguments)
    watched.automatic_optimization = automatic
    steps = Steps()
    callbacks = [steps, *([] if weighting is None else [weighting]), *monitors]
    torch.manual_seed(5)
    data = batches(7, partial=True)
    trainer = fit(watched, loader(*data), loader(*data[:2]), max_epochs=2, callbacks=callbacks, logger=Memory())
    return {
        "parameters and buffers": {k: v.clone() for k, v in watched.state_dict().items()},
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "weights": steps.weights,
        "gradients": steps.gradients,
        "state": {} if weighting is None else weighting.state_dict(),
        "random numbers": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
    }


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0)), where
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(found, expected), where
    elif isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}/{index}")
    else:
        assert found == expected, where


def assert_unchanged(kind: str, **arguments: Any) -> None:
    monitors = every_monitor(2)
    assert_same(train(KINDS[kind](), monitors, **arguments), train(KINDS[kind](), [], **arguments))
    assert all(bool(m.whole.sums[1].any()) for m in monitors if isinstance(m, GradientConflict | TaskAffinity))


# One for each way to measure; the other ones run with the slow tests.
WAYS = ("none", "norms of a layer", "features", "rows, by chance")


@pytest.mark.parametrize(
    "kind", [*WAYS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in WAYS)]
)
def test_no_bit_changes(kind: str) -> None:
    assert_unchanged(kind)


@pytest.mark.parametrize(
    "kind", ["features", "rows", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("none", "aggregator"))]
)
def test_no_bit_changes_where_gradients_are_accumulated(kind: str) -> None:
    assert_unchanged(kind, accumulate_grad_batches=2, gradient_clip_val=0.5)


@pytest.mark.parametrize(
    "kind", ["losses", "features", *(pytest.param(k, marks=pytest.mark.slow) for k in ("none", "norms of a layer"))]
)
def test_no_bit_changes_where_lightning_optimizes(kind: str) -> None:
    monitors = every_monitor()
    assert_same(train(KINDS[kind](), monitors, automatic=True), train(KINDS[kind](), [], automatic=True))
    assert not any(monitor.off for monitor in monitors)


def test_it_would_notice() -> None:
    class Draws(Monitor):
        def observe(self, *_: Any) -> None:
            torch.rand(1)

    with pytest.raises(AssertionError):
        assert_same(train(None, [Draws()]), train(None, []))


def test_tasks_are_those_of_the_module() -> None:
    monitor = GradientConflict(1, figure=False)
    train(None, [monitor])
    assert monitor.tasks == TASKS
    assert monitor.cosines.shape == (3, 3)
