"""Logs figures, texts and hyperparameters to every logger that takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from lightning_mtl.method.arguments import GivenArguments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EQUAL = "equal"
"""What stands for the method where the Trainer has none."""


def loggers_of(trainer: pl.Trainer) -> list[Logger]:
    """Return a Trainer's loggers on rank 0, and none on the other ranks."""
    return list(trainer.loggers) if trainer.is_global_zero else []


def step_of(trainer: pl.Trainer) -> int:
    """Return the place on the axis where Lightning logs an epoch's end: batches that stepped, which start at 0."""
    return max(trainer.fit_loop.epoch_loop._batches_that_stepped - 1, 0)


def take_figures(trainer: pl.Trainer) -> bool:
    """Return whether a figure would reach one of the loggers, so that it is worth drawing."""
    return any(_writer(logger, "log_image", "add_figure", "log_figure") for logger in trainer.loggers)


def log_figure(loggers: Sequence[Logger], name: str, figure: Figure, step: int) -> None:
    """Log a figure to the loggers that take one: TensorBoard, Weights & Biases, MLflow, Comet, and those alike.

    A logger is asked by what it has: ``log_image`` of its own, or ``add_figure`` or ``log_figure`` of its experiment.

    Args:
        loggers: Of rank 0.
        name: What it is called.
        figure: The figure.
        step: The place on the axis.
    """
    for logger in loggers:
        found, write = _writer(logger, "log_image", "add_figure", "log_figure") or ("", None)
        if write is None:
            continue
        if isinstance(logger, MLFlowLogger):
            write(logger.run_id, figure, f"{name}/{step}.png")
        elif found == "log_image":
            write(name, [figure], step)
        elif found == "add_figure":
            write(name, figure, step)
        else:
            write(figure_name=name, figure=figure, step=step)


def log_text(loggers: Sequence[Logger], name: str, text: str, step: int) -> None:
    """Log a text in Markdown to the loggers that take one, as :func:`log_figure` does."""
    for logger in loggers:
        found, write = _writer(logger, "log_text", "add_text", "log_text") or ("", None)
        if write is None:
            continue
        if isinstance(logger, MLFlowLogger):
            write(logger.run_id, text, f"{name}/{step}.md")
        elif found == "add_text":
            write(name, text, step)
        elif hasattr(logger, "log_text"):
            write(name, columns=["text"], data=[[text]], step=step)
        else:
            write(text, step=step, metadata={"name": name})


def _writer(logger: Logger, own: str, *of_experiment: str) -> tuple[str, Callable[..., Any]] | None:
    """The method that takes it, with its name: the logger's own, or the first of these that the experiment has."""
    if hasattr(logger, own):
        return own, getattr(logger, own)
    experiment = getattr(logger, "experiment", None)
    return next(((name, getattr(experiment, name)) for name in of_experiment if hasattr(experiment, name)), None)


def hyperparameters_of(method: GivenArguments | None) -> dict[str, Any]:
    """Describe a method for a run's hyperparameters, in names and values that all loggers take.

    Returns:
        ``method``, its name; ``method_call``, how it prints, ``GradNorm(alpha=0.5)``; and ``method_arguments``, all
        that it was made with, defaults included, what is None left out. Loggers that know no nested values write
        ``method_arguments/alpha``. TensorBoard has columns for what its first run has, so that runs of several methods
        differ in the call there.

    Example:
        >>> from lightning_mtl.weighting import DWA
        >>> hyperparameters_of(DWA(temperature=1.0))["method_arguments"]["temperature"]
        1.0
        >>> hyperparameters_of(None)
        {'method': 'equal', 'method_call': 'equal'}
    """
    if method is None:
        return {"method": EQUAL, "method_call": EQUAL}
    arguments = {name: _plain(value) for name, value in method.arguments.items() if value is not None}
    named = {"method": type(method).__name__, "method_call": repr(method)}
    return named | ({"method_arguments": arguments} if arguments else {})


def _plain(value: object) -> Any:  # noqa: ANN401 - numbers, texts, and dicts of them
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    return repr(value)


def log_hyperparameters(
    loggers: Sequence[Logger], found: Mapping[str, Any], others: Mapping[str, Any], results: Sequence[str]
) -> None:
    """Add hyperparameters to those of the run: TensorBoard's HPARAMS, W&B's config, MLflow's params.

    Args:
        loggers: Of rank 0.
        found: What to add.
        others: What Lightning is about to log by itself. TensorBoard keeps the first that a run writes, so that both
            have to come together.
        results: The logged metrics that TensorBoard's HPARAMS shows beside them.
    """
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(dict(found))
            continue
        # Not log_hyperparams, which would write values of the metrics at step 0 into their curves.
        logger.hparams = {**logger.hparams, **others, **found}
        values = logger._sanitize_params(_flat(logger.hparams))
        writer = logger.experiment._get_file_writer()
        for summary in hparams(values, dict.fromkeys(results, 0.0)):
            writer.add_summary(summary)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
