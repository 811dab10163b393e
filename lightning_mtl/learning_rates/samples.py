"""Targets and predictions of the same samples side by side, over all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_mtl.distributed import Ranks
from lightning_mtl.task import TaskOutput


def aligned(
    outputs: Mapping[str, TaskOutput],
    tasks: Sequence[str],
    what: Literal["targets", "predictions"],
    limit: int,
    device: torch.device,
) -> Tensor:
    """Lay one micro-batch's targets, or predicted classes, side by side.

    Args:
        outputs: What the batch says about the tasks that it has.
        tasks: All tasks.
        what: ``"targets"`` or ``"predictions"``.
        limit: Take at most so many elements, evenly spread; dense targets have one for each pixel.
        device: Where the result lies if the batch has no task.

    Returns:
        ``[K, n]``, float32, nan for the tasks that the batch lacks.

    Raises:
        ValueError: If a task has none, or not one for each sample of the others.
    """
    columns: dict[str, Tensor] = {}
    for task, output in outputs.items():
        value = output.target if what == "targets" else output.prediction
        if value is None:
            raise ValueError(
                f"The relatedness of tasks is measured on their {what}, and task {task!r} came without; return "
                "TaskOutput(loss, prediction, target) from task_losses."
            )
        value = value.detach()
        columns[task] = (value if what == "targets" else _classes(value)).reshape(-1)
    lengths = {task: column.numel() for task, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"The relatedness of tasks is measured on one number a task for each sample, but the {what} of a batch "
            f"hold {lengths} of them; give every task a target for the same samples (nan where a label is missing, "
            "or none at all), or measure the gradients' cosine."
        )
    length = next(iter(lengths.values()), 0)
    if length > limit:
        spread = torch.arange(limit, device=device) * length // limit
        columns = {task: column[spread] for task, column in columns.items()}
    values = torch.full((len(tasks), min(length, limit)), torch.nan, device=device)
    for position, task in enumerate(tasks):
        if task in columns:
            values[position] = columns[task]
    return values


def _classes(prediction: Tensor) -> Tensor:
    """The predicted class: the largest along dimension 1; of one number, whether it passes a half, or as a logit 0."""
    if not prediction.is_floating_point():
        return prediction
    if prediction.ndim > 1 and prediction.shape[1] > 1:
        return prediction.argmax(1)
    probable = ((prediction >= 0) & (prediction <= 1)).all()
    return prediction > torch.where(probable, 0.5, 0.0)


def of_all_ranks(values: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """Join the micro-batches' ``[K, n]`` of all ranks, the same on each of them."""
    here = torch.cat(list(values), dim=1)
    return here if ranks.size == 1 else torch.cat(gather_all_tensors(here, ranks.group), dim=1)
