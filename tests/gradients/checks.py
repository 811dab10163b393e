"""One fit of a situation, and what is compared: gradients, measured signals, buffers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

from lightning_mtl import MultiTaskModule, Signals, Weighting
from tests.gradients.per_task import SEED, Gradients, PerTask, dense
from tests.gradients.situations.base import Situation, seed_everything
from tests.training import Steps, loader

# Plain PyTorch gives the same warnings for these models, and what is prototype or deprecated there is no matter here.
HARMLESS = (
    # torch 2.14 says so of scripts, which are among the models.
    "ignore:`torch.jit.script` is deprecated:FutureWarning",
    "ignore:Full backward hook is firing:UserWarning",
    "ignore:Using a non-full backward hook:FutureWarning",
    "ignore:.*nested tensors is in prototype stage:UserWarning",
    "ignore:.*torch.jit.*deprecated:DeprecationWarning",
    "ignore:.*torch.jit.*not supported:DeprecationWarning",
    "ignore:Casting complex values to real:UserWarning",
    "ignore:.*barebones:",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:Sparse invariant checks:UserWarning",
)


class Watch(Steps):
    """Keeps each step's gradients, signals and weights; every training batch starts with the same random numbers."""

    batches = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.batches += 1
        seed_everything(SEED)

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        assert isinstance(pl_module, MultiTaskModule)
        self.module = pl_module
        super().observe(trainer, pl_module, signals, weights)

    def weights_of(self, step: int) -> dict[str, float]:
        """The weights of the present tasks; they are handed over for all tasks of the module, in its order."""
        weights, tasks = self.weights[step], list(self.module.tasks)
        assert weights is not None
        assert len(weights) == len(tasks)
        every = dict(zip(tasks, weights.double().tolist(), strict=True))
        return {task: every[task] for task in self.signals[step].tasks}


def train(
    module: MultiTaskModule,
    batches: Sequence[Any],
    *callbacks: pl.Callback,
    watch: Watch | None = None,
    **arguments: Any,
) -> Watch:
    """Fit the batches once, without anything that only costs time."""
    watch = Watch() if watch is None else watch
    # The environment is given: Lightning would look for schedulers of clusters otherwise.
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "barebones": True,
        "max_epochs": 1,
        "plugins": [LightningEnvironment()],
    }
    with patch("lightning.pytorch.trainer.connectors.callback_connector._load_external_callbacks", lambda _: []):
        # Lightning would read the metadata of all installed packages for every Trainer.
        trainer = pl.Trainer(**(settings | arguments), callbacks=[watch, *callbacks])
    trainer.fit(module, loader(*batches))
    return watch


def first_step(situation: Situation, place: str, weighting: Weighting | None, **arguments: Any) -> Watch | None:
    """Train one step; None where the place is impossible and the error says why."""
    try:
        return train(situation.build(**arguments), [situation.inputs(0)], *([] if weighting is None else [weighting]))
    except ValueError as error:
        words = situation.refused.get(place)
        if words is None or not re.search(words, str(error), re.IGNORECASE):
            raise
        return None


@dataclass
class Close:
    """Compares with a tolerance relative to the largest expected element, or to 1 where that is smaller."""

    tolerance: float

    def check(self, found: Tensor, expected: Tensor, what: str) -> None:
        assert found.shape == expected.shape, f"{what}: shape {list(found.shape)}, not {list(expected.shape)}"
        error = (found.to(expected.dtype) - expected).abs()
        limit = self.tolerance * max(1.0, float(expected.abs().max()))
        assert bool((error <= limit).all()), f"{what}: off by {float(error.max()):.1e}\n{found}\nnot\n{expected}"


def check_gradients(found: Gradients, expected: Gradients, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        actual = found[name]
        if gradient is None:
            assert actual is None, f"{name} takes part in nothing, yet it got a gradient"
        else:
            assert actual is not None, f"{name} got no gradient, not {gradient}"
            Close(tolerance).check(dense(actual), gradient, name)


def check_signals(
    watch: Watch, weighting: Weighting, expected: PerTask, place: str, like: Mapping[str, Tensor], tolerance: float
) -> None:
    """The Gramian and the norms are those of the tasks' gradients, one task at a time."""
    signals = watch.signals[0]
    gramian = expected.gramian(place, like)
    close = Close(10 * tolerance)
    assert signals.norms is not None
    close.check(signals.norms.double(), gramian.diagonal().sqrt(), "norms")
    if weighting.measures == "gramian":
        assert signals.gramian is not None
        close.check(signals.gramian, gramian, "gramian")


def parameters_of(module: MultiTaskModule) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}
