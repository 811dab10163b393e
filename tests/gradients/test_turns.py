"""Accumulation windows in which tasks take turns or are absent.

Such a window gives the weights that one joint batch of the same samples gives, or its setup is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mtl import Aggregator, MultiTaskModule, Task, Weighting
from lightning_mtl import weighting as methods
from tests.gradients.checks import HARMLESS, Close, Watch, check_gradients, train
from tests.gradients.methods import (
    FromGramian,
    FromGramianSharedOnly,
    FromLosses,
    FromLossesSharedOnly,
    FromNorms,
    OwnHeads,
    Summed,
)
from tests.gradients.per_task import dense
from tests.gradients.situations.base import WIDTH, deep, random_inputs, seed_everything
from tests.thinning import thinned

pytestmark = [pytest.mark.filterwarnings(ignored) for ignored in HARMLESS]

TASKS = {"a": 1.0, "b": 3.0, "c": 0.4}
STEPS = 2

# The tasks of each micro-batch of a window.
WINDOWS: dict[str, tuple[str, ...]] = {
    "in turn": ("c", "a", "b"),
    "two, then the third": ("ab", "c"),
    "one comes again": ("a", "ab", "bc"),
    "one absent": ("a", "b"),
    "one absent, one empty": ("b", "", "c"),
}
GRADIENT_KINDS = (FromNorms, FromGramianSharedOnly, OwnHeads)
PLACES: tuple[Any, ...] = ("trunk", "features", "last_layer", ("trunk.0",))
KINDS: dict[str, Callable[[], Weighting]] = {
    **{make.__name__: make for make in (FromLosses, FromLossesSharedOnly)},
    **{
        f"{make.__name__} at {at if isinstance(at, str) else at[0]}": functools.partial(make, at=at)
        for make in GRADIENT_KINDS
        for at in PLACES
    },
    "Summed at trunk": Summed,
    "Summed at features": functools.partial(Summed, at="features"),
}
METHODS: dict[str, Callable[[], Weighting]] = {
    "DWA": methods.DWA,
    "STCH": functools.partial(methods.STCH, warmup_epochs=1),
    "GLS": methods.GLS,
    "FAMO": methods.FAMO,
    "FAMO, next batch": functools.partial(methods.FAMO, losses_after="next_batch"),
    "CoVWeighting": methods.CoVWeighting,
    "RLW": methods.RLW,
    "LBTW": methods.LBTW,
    "IMTLL": methods.IMTLL,
    "ScaleInvariant": methods.ScaleInvariant,
    "UncertaintyWeighting": functools.partial(methods.UncertaintyWeighting, lr=0.1),
    "GradNorm": functools.partial(methods.GradNorm, lr=0.1),
    "GradNorm at trunk": functools.partial(methods.GradNorm, lr=0.1, at="trunk"),
    "GradientNormBalance at last_layer": functools.partial(methods.GradientNormBalance, at="last_layer"),
    "MGDA": methods.MGDA,
    "MGDA at features": functools.partial(methods.MGDA, at="features"),
    "MGDA by losses": functools.partial(methods.MGDA, normalize="loss+"),
    "PCGrad": methods.PCGrad,
    "PCGrad at last_layer": functools.partial(methods.PCGrad, at="last_layer"),
    "CAGrad at last_layer": functools.partial(methods.CAGrad, at="last_layer"),
    "NashMTL at last_layer": functools.partial(methods.NashMTL, at="last_layer"),
    "IMTL": methods.IMTL,
    "IMTL at features": functools.partial(methods.IMTL, at="features"),
    "FairGrad at features": functools.partial(methods.FairGrad, at="features"),
    "GradDrop": methods.GradDrop,
    "CRMOGM": lambda: methods.CRMOGM(methods.MGDA()),
    "every second step": functools.partial(FromGramian, every_n_steps=2),
    "every second step at last_layer": functools.partial(FromNorms, every_n_steps=2, at="last_layer"),
}


class Turns(MultiTaskModule):
    """The batch is ``{task: inputs}``; each task's inputs go through the trunk by themselves."""

    def __init__(self, **arguments: Any) -> None:
        heads: dict[str, nn.Module] = {task: nn.Linear(WIDTH, 1) for task in TASKS}
        descent = functools.partial(torch.optim.SGD, lr=0.0)
        super().__init__(deep(), heads, {task: Task(F.mse_loss) for task in TASKS}, optimizer=descent, **arguments)
        self.double()

    def task_losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for task, x in batch.items():
            found[task] = TASKS[task] * F.mse_loss(self.heads[task](self.trunk(x)), x[:, :1] + TASKS[task])
        return found


def windows(pattern: tuple[str, ...]) -> tuple[list[Any], list[Any]]:
    """The micro-batches of some windows, and for each window the one joint batch of the same samples."""
    micro_batches: list[Any] = []
    joint: list[Any] = []
    for step in range(STEPS):
        window = [
            {task: random_inputs(100 * step + 10 * position + ord(task)) for task in tasks}
            for position, tasks in enumerate(pattern)
        ]
        micro_batches += window
        whole = {task: [own[task] for own in window if task in own] for task in TASKS}
        joint.append({task: torch.cat(parts) for task, parts in whole.items() if parts})
    return micro_batches, joint


@pytest.mark.parametrize("kind", thinned(KINDS))
@pytest.mark.parametrize("pattern", WINDOWS.values(), ids=WINDOWS)
def test_every_kind_weighs_as_one_joint_batch(kind: str, pattern: tuple[str, ...]) -> None:
    check_turns(KINDS[kind], pattern)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [("a", "b", "c"), ("ab", "c")], ids="-".join)
def test_every_method_weighs_as_one_joint_batch(method: str, pattern: tuple[str, ...]) -> None:
    check_turns(METHODS[method], pattern)


def check_turns(make: Callable[[], Weighting], pattern: tuple[str, ...]) -> None:
    micro_batches, joint = windows(pattern)
    expected = fit(make(), joint, Watch())
    weighting, found = make(), Watch()
    try:
        fit(weighting, micro_batches, found, accumulate_grad_batches=len(pattern))
    except ValueError:
        assert not found.batches, "refused after training had begun, not at setup"
        return
    assert len(found.signals) == len(expected.signals) == STEPS
    for step in range(STEPS):
        assert found.signals[step].tasks == expected.signals[step].tasks
        Close(1e-12).check(found.signals[step].losses, expected.signals[step].losses, f"losses in step {step}")
        if isinstance(weighting, Aggregator):
            check_shared(found, expected, step)
        else:
            weights, wanted = (list(watch.weights_of(step).values()) for watch in (found, expected))
            Close(1e-12).check(torch.tensor(weights), torch.tensor(wanted), f"weights in step {step}")


def fit(weighting: Weighting, batches: list[Any], watch: Watch, **arguments: Any) -> Watch:
    seed_everything(5)
    return train(Turns(**arguments), batches, weighting, watch=watch)


def check_shared(found: Watch, expected: Watch, step: int) -> None:
    """No weights exist: the direction of the shared parameters is compared."""
    names = [name for name in expected.gradients[step] if name.startswith("trunk")]
    wanted = {name: None if (g := expected.gradients[step][name]) is None else dense(g) for name in names}
    check_gradients({name: found.gradients[step][name] for name in names}, wanted, 1e-12)
