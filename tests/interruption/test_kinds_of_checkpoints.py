"""A checkpoint written at any moment of an epoch, and resumed: to the bit what the uninterrupted training does."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_mtl
from lightning_mtl.control import TaskCheckpoint
from lightning_mtl.learning_rates import Importance, Relatedness
from lightning_mtl.method.holder import Holder
from lightning_mtl.monitors.pairs import PairMonitor
from lightning_mtl.training.hooks import AutomaticStepHooks, StepHooks
from lightning_mtl.training.logging import Recorder
from lightning_mtl.tuning.comparing.trainings import GradientFigures
from lightning_mtl.tuning.pruning import Pruning
from lightning_mtl.weighting.validated import Validated
from lightning_mtl.weighting.wrapper import Wrapper
from tests.interruption.kinds import (
    EPOCHS,
    KINDS,
    MIXTURES,
    STEPS,
    Following,
    Outcome,
    Saving,
    StatefulData,
    assert_same,
    lines_by_step,
    run,
)
from tests.thinning import thinned
from tests.training import flat_parameters

pytestmark = [
    # torchdata's loader calls what torch has deprecated: nothing of ours.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # Of normalization that is frozen, and of layers that a test leaves in evaluation mode.
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training:UserWarning"),
]

# Each is trained once, with all checkpoints, and resumed from every one of them.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in MIXTURES},
    "a stateful loader": ("thawing", {"data": StatefulData}),
    "a rate that follows validation": ("warmed up", {"cls": Following}),
    "counted in steps": ("branches", {"max_epochs": -1, "max_steps": EPOCHS * STEPS}),
    "counted in steps, a rate that follows": ("thawing", {"max_steps": EPOCHS * STEPS, "cls": Following}),
    "automatic": ("branches", {"automatic": True}),
    "automatic, a rate that follows": ("thawing", {"automatic": True, "cls": Following}),
    "automatic, a stateful loader": ("rates that follow", {"automatic": True}),
    "double precision": ("measured", {"precision": "64-true", "data": StatefulData}),
}


QUICK = ("branches", "a stateful loader", "a rate that follows validation", "automatic, a rate that follows")


@pytest.fixture(scope="module", params=[n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Outcome]:
    name, arguments = SETTINGS[request.param]
    folder = tmp_path_factory.mktemp("kinds")
    return request.param, folder, run(MIXTURES[name], Saving(folder), **arguments)


@pytest.mark.parametrize("kind", thinned(KINDS))
def test_resumed_is_uninterrupted(kind: str, whole: tuple[str, Path, Outcome]) -> None:
    setting, folder, expected = whole
    name, arguments = SETTINGS[setting]
    if "max_steps" in arguments and kind == "after the last epoch's last batch":
        pytest.skip("Lightning begins nothing where max_steps is reached.")
    path = folder / f"{kind}.ckpt"
    saved = torch.load(path, weights_only=True)
    resumed = run(MIXTURES[name], ckpt=path, **arguments)
    assert resumed.trainer.global_step == expected.trainer.global_step
    assert resumed.trainer.current_epoch == expected.trainer.current_epoch
    assert torch.equal(flat_parameters(resumed.module), flat_parameters(expected.module))
    assert_same(resumed.states(), expected.states(), kind)
    # What the step before the checkpoint logs is logged before or after it is written.
    first = int(saved["global_step"])
    assert lines_by_step(resumed, first) == lines_by_step(expected, first)


def every_callback() -> Iterator[type[pl.Callback]]:
    for found in pkgutil.walk_packages(lightning_mtl.__path__, "lightning_mtl."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    waiting: list[type[pl.Callback]] = [pl.Callback]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting += below
        yield from (cls for cls in below if cls.__module__.startswith("lightning_mtl."))


def test_every_callback_with_a_hook_of_an_epoch_takes_part() -> None:
    hooks = [
        name for name in dir(pl.Callback) if "epoch" in name or name in ("on_validation_start", "on_validation_end")
    ]
    found = {
        cls for cls in every_callback() if any(getattr(cls, hook) is not getattr(pl.Callback, hook) for hook in hooks)
    }
    tried: set[type] = {
        Recorder,
        Importance,
        Relatedness,
        Holder,
        PairMonitor,
        Validated,
        Wrapper,
    }  # in what others hold, and bases
    # Brought by the module in every run; a search's own; tried beside Lightning's checkpoints in tests/control.
    tried |= {StepHooks, AutomaticStepHooks, Pruning, GradientFigures, TaskCheckpoint}
    tried |= {type(callback) for mixture in MIXTURES.values() for callback in mixture.callbacks()}
    assert found - tried == set()
