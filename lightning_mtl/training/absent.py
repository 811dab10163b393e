"""A rank that lacks a task gives the others its part of the graph, and moves nothing that nobody computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_mtl.gradients.split import Split
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.window import Reduced, Window


def standing_in(
    module: TaskModule, window: Window, reduced: Reduced, absent: Sequence[str], split: Split, *, sharded: bool
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Make what stands in for the tasks that this rank lacks: the collectives expect every parameter in every graph.

    Args:
        module: What is trained.
        window: The optimizer step.
        reduced: The micro-batch's losses over all ranks.
        absent: The tasks that this rank lacks.
        split: What trunk and heads returned.
        sharded: Whether parameters are sharded over the ranks.

    Returns:
        Losses of 0 for absent tasks, and losses of 0 that belong to no task and are added to the penalty.
    """
    # FSDP2 gathers and reduces in the modules' own hooks: a head takes part by what it returned, or not at all.
    zero = reduced.losses.new_zeros(())
    if sharded:
        losses = {task: _ghost_of_outputs(split.head_outputs.get(task, ()), zero) for task in absent}
        return losses, [losses[task] for task in absent if task not in reduced.names]
    # DDP waits for every parameter's hook in the one synchronized backward pass: one ghost of all is enough.
    if not window.collects:
        return {}, [_ghost_of_parameters(module, zero)]
    # Layers that wait for the other ranks in each backward pass, one a task, wait here, too.
    if any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        return dict.fromkeys(absent, _ghost_of_outputs([output.s for output in split.outputs], zero)), []
    return {}, []


def _ghost_of_parameters(module: nn.Module, like: Tensor) -> Tensor:
    """A loss of 0 that depends on all of a module's parameters: a rank without samples has their graph, too."""
    # A table with sparse gradients has to get a sparse one: of no row.
    tables = {m.weight for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse}
    none = torch.zeros(0, dtype=torch.long, device=like.device)
    parts = [
        nn.functional.embedding(none, parameter, sparse=True).sum() if parameter in tables else (parameter * 0).sum()
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    return torch.stack([part.to(like.dtype) for part in parts]).sum()


def _ghost_of_outputs(outputs: Sequence[Tensor], like: Tensor) -> Tensor:
    """A loss of 0 that depends on what a module returned; sharded parameters take part in no other way."""
    if not outputs:
        return like
    return torch.stack([(output * 0).sum().to(like.dtype) for output in outputs]).sum()


def forget_unreached(module: TaskModule, window: Window, *, sharded: bool) -> None:
    """Leave parameters that no rank's loss depended on without gradients, so that no optimizer moves them."""
    if window.gradients is not None and window.gradients.reached is not None:
        reached = window.gradients.reached
        unreached = [p for p in module.parameters() if p not in reached]
    elif len(window.present) == len(module.tasks):
        return
    elif sharded:
        kept = {p for task in window.present for p in module.heads[task].parameters()}
        parts = [module.heads[task] for task in module.tasks if task not in window.present]
        parts += [] if window.present or window.penalties else [module.trunk]
        unreached = [p for part in parts for p in part.parameters() if p not in kept]
    else:
        parameters = list(module.parameters())
        # A gradient of zeros is no None: weight decay and momentum would move what nobody has computed.
        flags = torch.tensor([float(p in window.reached) for p in parameters], device=module.device)
        flags = window.ranks.sum(flags)
        unreached = [p for p, flag in zip(parameters, flags.tolist(), strict=True) if not flag]
    for parameter in unreached:
        parameter.grad = None
