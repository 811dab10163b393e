"""All-reduced losses and sample counts of one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.micro_batch import stack_losses
from lightning_mtl.task import TaskOutput


@dataclass
class Agreement:
    """The losses of the K tasks that some rank has samples of.

    Attributes:
        names: These tasks, in the module's order, the same on every rank.
        losses: ``[K]``, detached: the mean over all ranks' samples, or over the ranks that have the task.
        counts: ``[K]``, the samples of all ranks, None where every task counts the same.
        own_counts: ``[K]``, this rank's samples, 0 for a task that it lacks; None where all are 1.
        scores: ``[K]``, the batch's metric values, averaged like the losses; None if there are none.
    """

    names: list[str]
    losses: Tensor
    counts: Tensor | None
    own_counts: Tensor | None
    scores: Tensor | None = None

    def shares(self) -> Tensor | None:
        """This rank's share of each task's mean, ``[K]``; None means all of it."""
        if self.own_counts is None or self.counts is None:
            return None
        return self.own_counts / self.counts


def agree(
    outputs: Mapping[str, TaskOutput],
    losses: Tensor,
    tasks: Sequence[str],
    ranks: Ranks,
    scores: Mapping[str, Tensor] | None = None,
) -> Agreement:
    """Average the losses over the ranks, by their sample counts where these are given, in one collective.

    Args:
        outputs: What this rank's batch says about the tasks that it has, in the module's order.
        losses: Their losses as one vector, detached.
        tasks: All tasks of the module.
        ranks: Who takes part.
        scores: A metric's value on this rank's batch, for each task that it has.
    """
    names, device = list(outputs), losses.device
    given = [outputs[task].num_samples for task in names]
    counts = None
    if any(count is not None for count in given):
        counts = _as_vector([1 if count is None else count for count in given], losses)
    values = stack_losses([scores[task] for task in names], device) if scores else None
    if ranks.size == 1:
        return Agreement(names, losses, counts, counts, values)
    samples = torch.ones_like(losses) if counts is None else counts
    # One dtype on all ranks, whatever the losses that each of them has.
    table = torch.zeros(3, len(tasks), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    position = {task: index for index, task in enumerate(tasks)}
    own = torch.tensor([position[task] for task in names], dtype=torch.long, device=device)
    table[0, own] = (losses * samples).to(table)
    table[1, own] = samples.to(table)
    if values is not None:
        table[2, own] = (values.to(losses) * samples).to(table)
    own_counts = table[1].clone()
    ranks.sum(table)
    if len(names) < len(tasks):  # only a rank that lacks a task has to wait for what the others have
        names = [task for task, count in zip(tasks, table[1].tolist(), strict=True) if count > 0]
        index = torch.tensor([position[task] for task in names], dtype=torch.long, device=device)
        table, own_counts = table[:, index], own_counts[index]
    means = table / table[1]
    return Agreement(names, means[0], table[1], own_counts, None if scores is None else means[2])


def _as_vector(counts: Sequence[int | Tensor], losses: Tensor) -> Tensor:
    """Counts, of which numbers travel to the device in one piece, and in float32: pixels are too many for float16."""
    dtype, device = torch.promote_types(losses.dtype, torch.float32), losses.device
    if not any(isinstance(count, Tensor) for count in counts):
        return torch.tensor(counts, dtype=dtype, device=device)
    return torch.stack([torch.as_tensor(count, device=device).to(dtype) for count in counts])


def ghost_of_parameters(module: nn.Module, like: Tensor) -> Tensor:
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


def ghost_of_outputs(outputs: Sequence[Tensor], like: Tensor) -> Tensor:
    """A loss of 0 that depends on what a module returned; sharded parameters take part in no other way."""
    if not outputs:
        return like
    return torch.stack([(output * 0).sum().to(like.dtype) for output in outputs]).sum()
