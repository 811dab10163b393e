"""A rank that lacks a task gives the others its part of the graph, and moves nothing that nobody computed."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.split import Split
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.cast import Cast
from lightning_mtl.training.reduced import Reduced
from lightning_mtl.training.window import Window


def standing_in(
    module: TaskModule,
    window: Window,
    cast: Cast,
    reduced: Reduced,
    absent: Sequence[str],
    penalties: Mapping[str, Tensor],
    split: Split,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Make what stands in for what this rank lacks: the collectives expect every parameter in every graph.

    Args:
        module: What is trained.
        window: The optimizer step.
        cast: Who takes part.
        reduced: The micro-batch's losses over all ranks.
        absent: The tasks that this rank lacks.
        penalties: The penalties that it has.
        split: What trunk and heads returned.

    Returns:
        Losses of 0 for absent tasks, and losses of 0 that belong to no task and are added to the penalty.
    """
    # FSDP2 gathers and reduces in the modules' own hooks: a head takes part by what it returned, or not at all.
    zero = reduced.losses.new_zeros(())
    if cast.sharded:
        losses = {task: _ghost_of_outputs(split.head_outputs.get(task, ()), zero) for task in absent}
        return losses, [losses[task] for task in absent if task not in reduced.names]
    differ = cast.penalizes and _differ(penalties, window.ranks, module.device)
    # DDP waits for every parameter's hook in the one synchronized backward pass: one ghost of all is enough.
    if not window.collects:
        # By what all ranks know, for together they look for what none of them has reached.
        window.forgets |= cast.leaves_out or differ
        if absent or differ:
            return {}, [_ghost_of_parameters(module, zero)]
        if cast.leaves_out and window.micro_batches > 1:
            # DDP averages what the window's last backward pass reaches, and would leave out what only others have.
            return {}, [_ghost_of_parameters(module, zero, with_gradient=True)]
        return {}, []
    # The step's one backward pass reaches all parameters by itself, on each rank that has something to pass backward.
    ghosts = [zero] if differ and not penalties else []
    # Layers that wait for the other ranks in each backward pass, one a task, wait here, too.
    if absent and any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        return dict.fromkeys(absent, _ghost_of_outputs([output.s for output in split.outputs], zero)), ghosts
    return {}, ghosts


def _differ(penalties: Mapping[str, Tensor], ranks: Ranks, device: torch.device) -> bool:
    """Whether some rank has a penalty that another lacks: one collective."""
    own = zlib.crc32("\n".join(sorted(penalties)).encode())
    # Numbers are the same exactly if the square of their sum is R times the sum of their squares.
    total, squares = ranks.sum(torch.tensor([own, own**2 % 2**62], device=device)).tolist()
    return bool((total**2 - ranks.size * squares) % 2**62)


def _ghost_of_parameters(module: nn.Module, like: Tensor, *, with_gradient: bool = False) -> Tensor:
    """A loss of 0 that depends on all of a module's parameters: a rank without samples has their graph, too.

    Args:
        module: Whose parameters they are.
        like: A tensor of the loss's dtype.
        with_gradient: Leave out parameters without a gradient.
    """
    # A table with sparse gradients has to get a sparse one: of no row.
    tables = {m.weight for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse}
    none = torch.zeros(0, dtype=torch.long, device=like.device)
    parts = [
        nn.functional.embedding(none, parameter, sparse=True).sum() if parameter in tables else (parameter * 0).sum()
        for parameter in module.parameters()
        if parameter.requires_grad and not (with_gradient and parameter.grad is None)
    ]
    return torch.stack([part.to(like.dtype) for part in parts]).sum() if parts else like


def _ghost_of_outputs(outputs: Sequence[Tensor], like: Tensor) -> Tensor:
    """A loss of 0 that depends on what a module returned; sharded parameters take part in no other way."""
    if not outputs:
        return like
    return torch.stack([(output * 0).sum().to(like.dtype) for output in outputs]).sum()


def forget_absent(module: TaskModule, window: Window, cast: Cast) -> None:
    """Leave parameters that no rank's loss depended on without gradients, so that no optimizer moves them."""
    if window.ranks.size > 1:
        _forget_unreached(module, window, sharded=cast.sharded)
    if module.trunk_parts.owning:
        _forget_owned(module, window, sharded=cast.sharded)
    if cast.whole is not None:
        cast.whole.scatter(module)


def _forget_owned(module: TaskModule, window: Window, *, sharded: bool) -> None:
    # An operation on all tasks, and anything compiled, gives an absent task's parameters a gradient of zeros. Other
    # numbers are somebody's who reaches them all the same, such as a penalty of the user's.
    absent = set(module.tasks).difference(window.present)
    owned = [p for p in module.trunk_parts.owned(absent) if sharded or p.grad is not None]
    if not owned:
        return
    flags = torch.stack([_numbers(p.grad, module.device).any() for p in owned]).float()
    total = window.ranks.sum(flags) if sharded else flags  # sharded, a rank has a part of each
    for parameter, flag in zip(owned, total.tolist(), strict=True):
        if not flag:
            parameter.grad = None


def _numbers(gradient: Tensor | None, device: torch.device) -> Tensor:
    """What this rank holds of a gradient; an empty tensor where it is None."""
    if gradient is None:
        return torch.zeros(0, device=device)
    if isinstance(gradient, DTensor):
        return gradient.to_local()
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _forget_unreached(module: TaskModule, window: Window, *, sharded: bool) -> None:
    if window.gradients is not None and window.gradients.reached is not None:
        reached = window.gradients.reached
        unreached = [p for p in module.parameters() if p not in reached]
    elif len(window.present) == len(module.tasks) and not window.forgets:
        return
    elif sharded:
        kept = {p for task in window.present for p in module.the_heads[task].parameters()}
        parts = [module.the_heads[task] for task in module.tasks if task not in window.present]
        parts += [] if window.present or window.penalties or module.the_trunk is None else [module.the_trunk]
        unreached = [p for part in parts for p in part.parameters() if p not in kept]
    else:
        parameters = list(module.parameters())
        # A gradient of zeros is no None: weight decay and momentum would move what nobody has computed.
        flags = torch.tensor([float(p in window.reached) for p in parameters], device=module.device)
        flags = window.ranks.sum(flags)
        unreached = [p for p, flag in zip(parameters, flags.tolist(), strict=True) if not flag]
    for parameter in unreached:
        parameter.grad = None


def warn_of_untrained(module: TaskModule, trained: Collection[str]) -> None:
    """Warn, after a fit's first epoch, of tasks that no step on any rank has trained: a wrong name looks like this."""
    learned = module.tasks if module.learned_tasks is None else module.learned_tasks
    if untrained := [task for task in module.tasks if task in learned and task not in trained]:
        rank_zero_warn(
            f"No step of the first epoch has trained the tasks {untrained}: they were absent from every batch, or "
            "their losses were not finite. Look at the names of the batches' targets, or of what task_losses returns."
        )
