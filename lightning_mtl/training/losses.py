"""A micro-batch's losses are averaged over the ranks, counted, and handed to the gradient engines."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.devices import numbers, widest
from lightning_mtl.distributed import Ranks, log_reduced, sum_over
from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.micro_batch import MicroBatch, stack_losses, starts_of
from lightning_mtl.gradients.split import Split
from lightning_mtl.task.labels import number_of_samples
from lightning_mtl.task.module import TaskModule
from lightning_mtl.task.task import TaskOutput
from lightning_mtl.training.absent import standing_in
from lightning_mtl.training.cast import Cast
from lightning_mtl.training.reduced import Reduced
from lightning_mtl.training.resting import set_aside
from lightning_mtl.training.window import Window


def reduce_losses(
    outputs: Mapping[str, TaskOutput],
    tasks: Sequence[str],
    ranks: Ranks,
    device: torch.device,
    scores: Mapping[str, Tensor] | None = None,
) -> Reduced:
    """Average a micro-batch's losses over the ranks, by their sample counts where there are some: one collective.

    Args:
        outputs: What this rank's batch says about the tasks that it has, in the module's order.
        tasks: All tasks of the module.
        ranks: Who takes part.
        device: Where the losses lie.
        scores: A metric's value on this rank's batch, for each task that it has.
    """
    names = list(outputs)
    given = [outputs[task].num_samples for task in names]
    losses = stack_losses([output.loss.detach() for output in outputs.values()], device)
    counts = None if given.count(None) == len(given) else _counts(given, losses)
    values = stack_losses([scores[task] for task in names], device) if scores else None
    if ranks.size == 1:
        return Reduced(names, losses, losses, counts, counts, values)
    # All tasks have a column, in the module's order: which of them a rank lacks, the others learn by the same sum.
    position = {task: index for index, task in enumerate(tasks)}
    samples = torch.ones_like(losses) if counts is None else counts
    # One dtype on all ranks, whatever the losses that each of them has.
    table = torch.zeros(3, len(tasks), dtype=widest(device), device=device)
    own = numbers([position[task] for task in names], device, torch.long)
    table[0, own] = (losses * samples).to(table)
    table[1, own] = samples.to(table)
    if values is not None:
        table[2, own] = (values.to(losses) * samples).to(table)
    own_counts = table[1].clone()
    ranks.sum(table)
    if len(names) < len(tasks):  # only a rank that lacks a task has to wait for what the others have
        names = [task for task, count in zip(tasks, table[1].tolist(), strict=True) if count > 0]
        index = numbers([position[task] for task in names], device, torch.long)
        table, own_counts = table[:, index], own_counts[index]
    means = table / table[1]
    return Reduced(names, means[0], losses, table[1], own_counts, None if scores is None else means[2])


def over_scales(
    window: Window, outputs: dict[str, TaskOutput], reduced: Reduced
) -> tuple[dict[str, TaskOutput], Reduced]:
    """Divide a micro-batch's losses by their tasks' scales, which a task's first losses may set.

    What a rank reports of its own, ``reduced.own``, stays in the tasks' units.
    """
    if window.scales is None or not reduced.names:
        return outputs, reduced
    positions = window.positions(reduced.names)
    if not window.repeats:
        window.scales.learn(positions, reduced.losses)
    scales, own = window.scales.of(positions), window.scales.of(window.positions(list(outputs)))
    scaled = {
        task: replace(output, loss=output.loss / scale)
        for (task, output), scale in zip(outputs.items(), own.unbind(), strict=True)
    }
    scores = reduced.scores
    if window.probes and scores is not None:  # traces, of residuals that are not scaled
        scores = scores / scales
    return scaled, replace(reduced, losses=reduced.losses / scales, scores=scores)


def to_weigh(
    window: Window, cast: Cast, outputs: dict[str, TaskOutput], reduced: Reduced, others: Sequence[Tensor]
) -> tuple[dict[str, TaskOutput], Reduced, dict[str, Tensor]]:
    """Make of a micro-batch's losses what a weighting may see, and a penalty of those that it may not."""
    if window.scales is not None:
        outputs, reduced = over_scales(window, outputs, reduced)
    if not window.resting.head_only:
        return outputs, reduced, {}
    return set_aside(window, cast, outputs, reduced, others)


def _counts(given: Sequence[int | Tensor | None], losses: Tensor) -> Tensor:
    """Counts, of which numbers travel to the device in one piece, and in float32: pixels are too many for float16."""
    counts = [1 if count is None else count for count in given]
    return _stacked(counts, losses.device, torch.promote_types(losses.dtype, torch.float32))


def _stacked(counts: Sequence[float | Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Counts as one tensor; where some are tensors, a number becomes one on the device itself."""
    known = [count for count in counts if not isinstance(count, Tensor)]
    if len(known) == len(counts):
        return numbers(known, device, dtype)
    filled = functools.partial(torch.full, (), dtype=dtype, device=device)
    return torch.stack([c.to(device, dtype) if isinstance(c, Tensor) else filled(c) for c in counts])


def micro_batch_of(
    module: TaskModule,
    window: Window,
    cast: Cast,
    reduced: Reduced,
    outputs: Mapping[str, TaskOutput],
    penalties: Mapping[str, Tensor],
    split: Split,
    *,
    unseen: bool,
) -> MicroBatch:
    """Put this rank's losses in the form that the engines read, with what the other ranks expect of it.

    Args:
        module: What is trained.
        window: The optimizer step.
        cast: Who takes part.
        reduced: The losses over all ranks.
        outputs: This rank's losses.
        penalties: Scalars that are added with weight 1.
        split: The trunk's outputs, where they were remembered.
        unseen: Whether the graph is to be looked at for what cannot be measured.
    """
    ranks, zero = window.ranks, reduced.losses.new_zeros(())
    penalty = torch.stack([value.to(module.device) for value in penalties.values()]).sum() if penalties else None
    losses = {task: output.loss for task, output in outputs.items()}
    absent = [task for task in module.tasks if task not in outputs]
    if ranks.size > 1:
        stand_ins, ghosts = standing_in(module, window, cast, reduced, absent, penalties, split)
        losses.update(stand_ins)
        if ghosts:
            penalty = torch.stack([*ghosts, *([] if penalty is None else [penalty])]).sum()
        lacks_some = len(reduced.names) < len(module.tasks)
        if not window.collects and (lacks_some or window.forgets or (cast.penalizes and window.size > 1)):
            window.reached.update(reached_leaves([*(o.loss for o in outputs.values()), *penalties.values()]))
    # Gradients that are collected are summed over the window, and a penalty is to count once in it.
    if penalty is not None and window.collects and window.size > 1:
        penalty = penalty / window.size
    # One process and one batch: a loss is its own mean, and nothing has to be multiplied.
    shares = None
    if ranks.size > 1 or window.size > 1:
        shares = reduced.own_counts if window.pools else reduced.shares()
        if shares is not None and (not window.collects or cast.sharded):
            shares = shares * ranks.size  # what the average over the ranks divides by
    # A task that only others have counts here, too, with a loss of 0 that has no graph.
    every_loss = [losses.get(task, zero) for task in reduced.names]
    scale: Tensor | None = None
    starts: list[Tensor | None] = [None] * len(every_loss)
    if cast.scaler is not None and (window.collects or window.way == "features" or window.renews):
        scale = cast.scaler.scale(torch.ones((), device=module.device))
    if scale is not None or shares is not None:
        starts = starts_of(every_loss, shares, scale)
    return MicroBatch(reduced.names, every_loss, penalty, split, starts, absent, shares, scale, ranks, unseen)


def sample_counts(outputs: Sequence[TaskOutput]) -> Tensor | float:
    """How many samples each task's loss is a mean over, for the means of an epoch: one number if all agree."""
    # Most batches have one size for all tasks; then the count stays a number of the host.
    counts = [_count(output) for output in outputs]
    if not any(isinstance(count, Tensor) for count in counts) and len(set(counts)) == 1:
        return float(counts[0])
    return _stacked(counts, outputs[0].loss.device, torch.float32)


def _count(output: TaskOutput) -> Tensor | float:
    if output.num_samples is None:
        return float(_batch_size(output))
    return output.num_samples if isinstance(output.num_samples, Tensor) else float(output.num_samples)


def _batch_size(output: TaskOutput) -> int:
    target = output.target
    return target.shape[0] if isinstance(target, Tensor) and target.ndim else number_of_samples(target)


class LabelCounts:
    """The fraction of each task's samples that is labeled, over the first epoch and all ranks.

    Numbers that the host knows anyway are added up, in training steps of the first epoch alone: no transfer, no call a
    task in any other step. A sample whose target is labeled in part, a map for instance, counts as that part.

    Example:
        >>> counts = LabelCounts(["age", "smile"])
        >>> counts.counting = True
        >>> counts.add("age", num_samples=3, num_missing=1, batch_size=4)
        >>> counts.add_unlabeled(["age"], batch_size=2)
        >>> counts.fractions(counts.sums)
        {'age': 0.5}
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        self.position = {task: index for index, task in enumerate(tasks)}
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        # Labeled samples, all samples, and how often one was looked for.
        self.sums: list[list[float]] = [[0.0] * len(self.position) for _ in range(3)]
        self.counting = False

    @property
    def counts_now(self) -> bool:
        """Whether this is a training step's own look at its batch: evaluations, and second looks, have no gradients."""
        return self.counting and torch.is_grad_enabled()

    def add(self, task: str, num_samples: int, num_missing: int, batch_size: int) -> None:
        """Count a batch in which the task's labels were looked for."""
        if self.counts_now and batch_size:
            self._add(task, batch_size * num_samples / max(num_samples + num_missing, 1), batch_size, looked=True)

    def add_whole(self, outputs: Mapping[str, TaskOutput]) -> None:
        """Count a training step's batch for the tasks whose labels nobody looked for: they all count as there."""
        for task, output in outputs.items() if self.counting else ():
            if output.num_samples is None:
                size = float(_batch_size(output))
                self._add(task, size, size, looked=False)

    def add_unlabeled(self, tasks: Iterable[str], batch_size: int) -> None:
        """Count a batch that has no label at all of these tasks."""
        if self.counts_now:
            for task in tasks:
                self._add(task, 0.0, batch_size, looked=True)

    def _add(self, task: str, labeled: float, size: float, *, looked: bool) -> None:
        index = self.position[task]
        for row, value in zip(self.sums, (labeled, float(size), float(looked)), strict=True):
            row[index] += value

    def fractions(self, sums: Sequence[Sequence[float]]) -> dict[str, float]:
        """The fraction of each task that might lack labels, from sums like this object's."""
        return {
            task: sums[0][index] / sums[1][index]
            for task, index in self.position.items()
            if sums[2][index] and sums[1][index]
        }

    def log(self, module: pl.LightningModule) -> None:
        """Log ``labeled/<task>`` over all ranks for each task that might lack labels."""
        self.counting = False
        own = torch.tensor(self.sums, dtype=widest(module.device), device=module.device)
        total = sum_over(module.trainer, own)
        fractions = self.fractions(total.tolist())
        log_reduced(module, {f"labeled/{task}": fraction for task, fraction in fractions.items()})

    def state_dict(self) -> Tensor:
        """The sums so far, ``[3, K]``."""
        return torch.tensor(self.sums, dtype=torch.float64)

    def load_state_dict(self, state: Tensor) -> None:
        """Go on from the sums of an interrupted epoch."""
        self.sums = state.tolist()
