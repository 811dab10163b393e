"""What a step measures beside its gradients, for methods that ask: kernel traces, and the gradients of some tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl.gradients.beside import kernel_trace, rows_of
from lightning_mtl.gradients.graph import check_repeatable
from lightning_mtl.gradients.inner_products import Measured
from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.task.task import TaskOutput
from lightning_mtl.training.cast import Cast
from lightning_mtl.training.checks import no_shared_parameters
from lightning_mtl.training.window import Window


def traces_of(
    window: Window, cast: Cast, outputs: Mapping[str, TaskOutput], shared: Sequence[Tensor], *, unseen: bool
) -> dict[str, Tensor]:
    """Estimate the mean diagonal entry of each task's neural tangent kernel on this rank's micro-batch.

    Raises:
        ValueError: If a task has no residuals, or no shared parameter can be trained.
    """
    weighting, residuals = window.weighting, dict[str, Tensor]()
    for task, output in outputs.items():
        if output.residuals is None:
            raise ValueError(
                f"{type(weighting).__name__} differentiates the residuals of each task, and task {task!r} gave none: "
                f"have task_losses return {{{task!r}: TaskOutput(loss, residuals=r)}}, where r are the numbers whose "
                "mean square the loss is, with their graph."
            )
        residuals[task] = output.residuals.to(output.loss.device)
    if weighting is None or not shared:
        raise no_shared_parameters(weighting)
    device = shared[0].device
    if unseen:
        check_repeatable([r for r in residuals.values() if r.requires_grad])
    # As where losses are scaled for half precision: a gradient of residuals may vanish, too.
    scale = None if cast.scaler is None else cast.scaler.scale(torch.ones((), device=device))
    signs, draws = weighting.probes(device), weighting.kernel_probes
    return {task: kernel_trace(r, shared, draws, signs, scale) for task, r in residuals.items()}


def renewed_rows(window: Window, batch: MicroBatch, shared: Sequence[Tensor]) -> Measured:
    """Measure the gradients of those tasks that a method wants to renew in this step.

    Raises:
        ValueError: If no shared parameter can be trained.
    """
    if window.weighting is None or not shared:
        raise no_shared_parameters(window.weighting)
    if batch.unseen:
        check_repeatable([loss for loss in batch.losses if loss.requires_grad])
    size = sum(parameter.numel() * (2 if parameter.is_complex() else 1) for parameter in shared)
    return Measured(rows=rows_of(batch, window.weighting.to_renew(batch.names, size), shared))
