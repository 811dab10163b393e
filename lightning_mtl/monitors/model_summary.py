"""Lightning's model summary with a row for each head, and without the metrics."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import ModelSummary as Summary
from torch import nn

from lightning_mtl.task.module import TaskModule

HELD_FOR_STAGES = ("train_task_metrics", "val_task_metrics", "test_task_metrics")


class TaskSummary(Summary):
    """Summarizes a module; of a multi-task module the heads are a row each, and what holds no parameters is left out.

    Metrics are there once for each stage; those with parameters, such as a network to compare features by, are kept.
    """

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """Return what is a row, by its name."""
        found = super().named_modules
        return list(_rows(found)) if isinstance(self._model, TaskModule) else found


def _rows(found: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, nn.Module]]:
    deeper = any(name.startswith("heads.") for name, _ in found)  # then the heads are listed already
    for name, module in found:
        empty = isinstance(module, nn.ModuleDict | nn.ModuleList) and not len(module)
        if empty or (name.partition(".")[0] in HELD_FOR_STAGES and not any(True for _ in module.parameters())):
            continue
        if name == "heads" and isinstance(module, nn.ModuleDict) and not deeper:
            # No dots: by their number Lightning tells how deep a row lies, and drops what is too deep.
            yield from ((f"heads/{task}", head) for task, head in module.items())
        else:
            yield name, module


class TaskModelSummary(ModelSummary):
    """Prints a :class:`TaskSummary` as text."""

    def _summary(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Summary:
        return TaskSummary(pl_module, max_depth=self._max_depth)


class RichTaskModelSummary(RichModelSummary):
    """Prints a :class:`TaskSummary` as a table of the package rich."""

    def _summary(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Summary:
        return TaskSummary(pl_module, max_depth=self._max_depth)


def show_heads(trainer: pl.Trainer) -> None:
    """Put these summaries in the place of Lightning's own in a Trainer; a summary of another class stays."""
    ours: dict[type[ModelSummary], type[ModelSummary]] = {
        ModelSummary: TaskModelSummary,
        RichModelSummary: RichTaskModelSummary,
    }
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for place, callback in enumerate(callbacks):
        if isinstance(callback, ModelSummary) and (made := ours.get(type(callback))) is not None:
            callbacks[place] = made(callback._max_depth, **callback._summarize_kwargs)
