"""A callback that trains a branching trunk from random choices to a tree."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_mtl.architectures.branching import LTB
from lightning_mtl.monitors.figures import heatmap, require_matplotlib
from lightning_mtl.monitors.loggers import log_figure, loggers_of, step_of, take_figures


class Branching(Callback):
    r"""Draws the noise of every :class:`LTB` in the model, lowers its temperature, hardens it and plots its choices.

    In warm-up epochs the nodes train while every parent stays equally likely. Then the logits train, too, at the
    temperature :math:`\tau_e = \tau_0 / \sqrt{1 + e}` in the e-th epoch after the warm-up. It has no state: all of it
    follows from the step and the epoch.

    Args:
        warmup_epochs: Epochs in which logits rest.
        temperature: :math:`\tau_0`, or a function of the epoch after the warm-up, counted from 0.
        harden_epoch: The epoch at whose start each child's likeliest parent becomes its only one; None never does.
        heatmaps: At each epoch's end, draw the branching probabilities as ``branching/...`` in TensorBoard, if the
            Trainer logs there.

    Raises:
        ValueError: If an argument is out of its range, or before training if the model holds no :class:`LTB`.
        ModuleNotFoundError: If matplotlib, which draws, is not installed.

    Source: Guo, Lee and Ulbricht, Learning to Branch for Multi-Task Learning, 2020, arXiv:2006.01895.

    Deviations: the fall of the temperature has the form that LibMTL's implementation gives it, its start being free.

    Example:
        >>> Branching(warmup_epochs=1, temperature=4.0, harden_epoch=10).temperature_in(epoch=4)
        2.0
    """

    def __init__(
        self,
        *,
        warmup_epochs: int = 0,
        temperature: float | Callable[[int], float] = 5.0,
        harden_epoch: int | None = None,
        heatmaps: bool = True,
    ) -> None:
        if warmup_epochs < 0:
            raise ValueError(f"Branching(warmup_epochs={warmup_epochs}) must be at least 0.")
        if not callable(temperature) and not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"Branching(temperature={temperature}) must be above 0 and finite, or a function.")
        if harden_epoch is not None and harden_epoch < max(warmup_epochs, 1):
            raise ValueError(
                f"Branching(harden_epoch={harden_epoch}) must come after the logits have trained: at least "
                f"{max(warmup_epochs, 1)}, or None; LTB.harden() hardens at once."
            )
        if heatmaps:
            require_matplotlib("Branching(heatmaps=True)")
        self.warmup_epochs, self.temperature = warmup_epochs, temperature
        self.harden_epoch, self.heatmaps = harden_epoch, heatmaps
        self._drawn: int | None = None
        self._trunks: dict[str, LTB] = {}

    def temperature_in(self, epoch: int) -> float:
        """Compute the temperature in an epoch of the training."""
        after = max(epoch - self.warmup_epochs, 0)
        return self.temperature(after) if callable(self.temperature) else self.temperature / math.sqrt(1 + after)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the trunks; refuse a model without branches."""
        self._drawn = None
        self._trunks = {path: part for path, part in pl_module.named_modules() if isinstance(part, LTB)}
        if not self._trunks:
            raise ValueError(
                f"Branching schedules an LTB, of which {type(pl_module).__name__} holds none; leave the callback out, "
                "or use LTB as the trunk or in it."
            )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Harden the trunks at ``harden_epoch``."""
        if self.harden_epoch is not None and trainer.current_epoch >= self.harden_epoch:
            for trunk in self._trunks.values():
                if not trunk.hardened:
                    trunk.harden()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:  # noqa: ANN401
        """Draw the noise of an optimizer step, once for all its micro-batches."""
        step, epoch = trainer.global_step, trainer.current_epoch
        if step == self._drawn:
            return
        self._drawn = step
        for trunk in self._trunks.values():
            if not trunk.hardened:
                trunk.sample(step, self.temperature_in(epoch), learns=epoch >= self.warmup_epochs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the branching probabilities."""
        if not self.heatmaps or not take_figures(trainer):
            return
        for path, trunk in self._trunks.items():
            for depth, probabilities in enumerate(trunk.probabilities()):
                last = depth == len(trunk.sizes) - 1
                children = trunk.tasks if last else [str(node) for node in range(len(probabilities))]
                figure = heatmap(
                    probabilities,
                    children,
                    [str(node) for node in range(trunk.sizes[depth])],
                    title="hardened" if trunk.hardened else "branching probability",
                    limits=(0, 1),
                    colors="Blues",
                    row_label="task" if last else f"node of stage {depth + 1}",
                    column_label=f"reads node of stage {depth}",
                )
                name = f"branching/{path}/stage {depth}"
                log_figure(loggers_of(trainer), name, figure, step_of(trainer))
