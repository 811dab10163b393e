"""What a run shows in its loggers before the first step: TensorBoard's charts, and the method as hyperparameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_mtl.learning_rates.task_learning_rate import task_rates_of
from lightning_mtl.method.base import weighting_of
from lightning_mtl.monitors.loggers import hyperparameters_of, log_hyperparameters, loggers_of
from lightning_mtl.task.module import TaskModule

Layout = dict[str, dict[str, list[str | list[str]]]]
MOST_RESULTS = 24
"""TensorBoard's HPARAMS shows a column for each result: more tasks and metrics than this leave the totals alone."""


def prepare_loggers(trainer: pl.Trainer, module: TaskModule, results: Sequence[str] | None) -> None:
    """Lay out TensorBoard's charts, and log the method with its arguments to all loggers.

    Args:
        trainer: What is about to fit.
        module: The module.
        results: The metrics that TensorBoard's HPARAMS shows; None takes what the validation logs.
    """
    loggers = loggers_of(trainer)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(layout_of(trainer, module))
    shown = results_of(trainer, module) if results is None else results
    log_hyperparameters(loggers, hyperparameters_of(weighting_of(trainer)), _of_lightning(trainer), shown)


def layout_of(trainer: pl.Trainer, module: TaskModule) -> Layout:
    """Charts with one line a task, for TensorBoard's custom-scalars tab; a chart that would stay empty is left out."""
    weighting, validates = weighting_of(trainer), trainer.enable_validation
    charts = {"weights": "weight", "losses": "loss"}
    if weighting is not None and weighting.measures != "losses":
        charts["gradient norms"] = "grad_norm"
    if task_rates_of(trainer) is not None:
        charts["learning rates"] = "lr"
    charts["epoch losses"] = "loss_epoch"
    if validates:
        charts["validation losses"] = "val/loss"
        charts |= {f"validation {name}": f"val/{name}" for name in _metrics_of(module)}
    # A pattern, no list of tasks: TensorBoard shows a chart once for all runs only where their layouts agree.
    return {"tasks": {title: ["Multiline", [f"^{re.escape(key)}/(?!total$)"]] for title, key in charts.items()}}


def results_of(trainer: pl.Trainer, module: TaskModule) -> list[str]:
    """The metrics that tell how a run went: those of the validation, or the training losses where there is none."""
    if not trainer.enable_validation:
        own, totals = [f"loss_epoch/{task}" for task in module.tasks], ["loss/total"]
    else:
        metrics = module.stage_metrics("val")
        named = [(task, name) for task in module.tasks for name in ("loss", *map(str, metrics.get(task, {})))]
        own = [f"val/{name}/{task}" for task, name in named]
        compared = any(task.baseline for task in module.tasks.values())
        totals = ["val/loss/total", *(["val/delta_m"] if compared else [])]
    return [*totals, *(own if len(own) <= MOST_RESULTS else [])]


def _metrics_of(module: TaskModule) -> list[str]:
    """The names of the validation's metrics, each once."""
    collections = module.stage_metrics("val").values()
    return list(dict.fromkeys(str(name) for metrics in collections for name in metrics))


def _of_lightning(trainer: pl.Trainer) -> dict[str, Any]:
    """The hyperparameters that Lightning logs by itself, as its ``save_hyperparameters`` has kept them."""
    found: dict[str, Any] = {}
    for part in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
        if part is not None and part._log_hyperparams:
            found |= {name: value for name, value in part.hparams_initial.items() if name != "_class_path"}
    return found
