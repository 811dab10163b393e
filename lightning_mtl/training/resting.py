"""Tasks whose heads train alone are set aside here: methods, monitors and what is shared do not see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_mtl.devices import numbers
from lightning_mtl.gradients.micro_batch import stack_losses, surrogate, unscaled
from lightning_mtl.gradients.rows import by_parameter
from lightning_mtl.gradients.torch_internals import parameter_hooks_off
from lightning_mtl.task.task import TaskOutput
from lightning_mtl.training.cast import Cast
from lightning_mtl.training.reduced import Reduced
from lightning_mtl.training.window import Window


def set_aside(
    window: Window, cast: Cast, outputs: dict[str, TaskOutput], reduced: Reduced, others: Sequence[Tensor]
) -> tuple[dict[str, TaskOutput], Reduced, dict[str, Tensor]]:
    """Part a micro-batch's tasks: those that a weighting is to weigh, and those whose heads train alone.

    Args:
        window: The step.
        cast: Who takes part.
        outputs: This rank's outputs of all tasks.
        reduced: Their losses over all ranks.
        others: The trainable parameters that are not shared.

    Returns:
        This rank's outputs of the former; their losses over all ranks; and the latter's losses as one scalar, which
        goes the way of a penalty: it is measured by nobody, has weight 1, and its gradient reaches no shared parameter.
    """
    alone = window.resting.head_only
    names = list(reduced.names)
    kept = [index for index, task in enumerate(names) if task not in alone]
    own = [index for index, task in enumerate(outputs) if task not in alone]
    beside = {task: output.loss for task, output in outputs.items() if task in alone}
    shares = reduced.shares()
    if shares is not None:
        shares = shares[numbers([names.index(task) for task in beside], shares.device, torch.long)]
    loss = _heads_alone(window, cast, list(beside.values()), shares, reduced.losses.device, others)
    outputs = {task: output for task, output in outputs.items() if task not in alone}
    # It is there on every rank and in every micro-batch, so that no rank looks for what another lacks.
    return outputs, _cut(reduced, kept, own), {"heads that train alone": loss}


def _cut(reduced: Reduced, kept: list[int], own: list[int]) -> Reduced:
    """The losses of some tasks, by their positions among all ranks' tasks and among this rank's."""
    at = numbers(kept, reduced.losses.device, torch.long)
    here = numbers(own, reduced.own.device, torch.long)

    def of(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[at]

    return replace(
        reduced,
        names=[reduced.names[index] for index in kept],
        losses=reduced.losses[at],
        own=reduced.own[here],
        counts=of(reduced.counts),
        own_counts=of(reduced.own_counts),
        scores=of(reduced.scores),
    )


def _heads_alone(
    window: Window,
    cast: Cast,
    losses: list[Tensor],
    shares: Tensor | None,
    device: torch.device,
    parameters: Sequence[Tensor],
) -> Tensor:
    """The sum of these losses, as a scalar with the gradients of parameters that are not shared, and no others.

    The graph stays whole, and is differentiated by those parameters alone: autograd stops where nothing leads to them,
    so that the trunk is not passed. To detach features instead would need to know where heads begin, which a
    ``task_losses`` of the user's does not say.
    """
    ranks = window.ranks
    if not losses:
        return torch.zeros((), device=device)
    # The backward pass averages over the ranks, and this rank has but its share of a mean over all samples.
    factors = torch.ones(len(losses), device=device) if shares is None else shares * ranks.size
    value = (stack_losses([loss.detach() for loss in losses], device) * factors).sum()
    scale = None if cast.scaler is None else cast.scaler.scale(torch.ones((), device=device))
    seeds = (factors if scale is None else factors * scale).unbind()
    pairs = [(loss, seed.to(loss)) for loss, seed in zip(losses, seeds, strict=True) if loss.requires_grad]
    if not pairs or not parameters:
        return value
    with parameter_hooks_off(parameters):  # they act once, on the final gradient
        found = torch.autograd.grad(
            [loss for loss, _ in pairs],
            parameters,
            [seed for _, seed in pairs],
            retain_graph=True,  # the other tasks pass it, too
            allow_unused=True,
        )
    gradients = by_parameter(parameters, found)

    def outgoing(outer: Tensor) -> list[Tensor]:
        factor = unscaled(outer, scale)
        return [gradient * factor for gradient in gradients.values()]

    return surrogate(value, list(gradients), outgoing) if gradients else value
