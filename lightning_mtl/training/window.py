"""A window is one optimizer step: its micro-batches' losses, the gradients kept for it and the weights that it got."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_mtl.control.resting import NONE_RESTS, Resting
from lightning_mtl.devices import numbers
from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.inner_products import Measured, Wanted
from lightning_mtl.gradients.sharded import ShardedTrunkGradients
from lightning_mtl.gradients.trunk import TrunkGradients
from lightning_mtl.gradients.trunk_gramian import TrunkGramian
from lightning_mtl.learning_rates.factor import Collected
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Decision, Signals
from lightning_mtl.training.reduced import Reduced
from lightning_mtl.training.scales import LossScales

Collection = TrunkGramian | TrunkGradients | ShardedTrunkGradients
"""What keeps a step's gradients until its weights are known."""
Way = Literal["losses", "features", "rows"]
"""How weights reach the gradients: in a weighted sum of losses, at the trunk's output, or in a sum of rows."""


class Window:
    """The state of one optimizer step.

    Args:
        tasks: All tasks of the module, in order.
        weighting: The Trainer's weighting; None weighs all tasks equally.
        step, epoch: Optimizer steps taken before; the present epoch.
        size, ranks: Micro-batches in a full window; the processes that train together.
        shares: ``[K]``, what multiplies each task's weight in the shared gradient, and there alone; None for 1.
        scales: What losses are divided by before anyone but the loggers sees them; None for 1.
        resting: The tasks that a callback has taken out of the training of what is shared; None for no task.

    Attributes:
        probes, renews, at_shared: Probes of each kernel; whether some tasks' rows, or anything, is measured.
        wanted, measures_at: What to measure before the weighting is asked, and where.
        keeps_rows, gradients: Whether gradients are kept in full until the step's weights are known, and those kept.
        layer: The parameters that gradients are measured at, over the micro-batches so far; None for a place of all.
        passes_again: Whether some step of the training may pass a part of the graph more than once.
        loss: The step's loss, detached; None before the first backward pass.
        keeps_batches: Whether the step's batches are kept until it is over.
        pools: Whether a task's loss is the mean over all samples of the window, or of the micro-batches' means.
        repeats: Whether an optimizer's closure asks for this step again, see :meth:`again`.
        reached: The parameters that this rank's losses and penalties reach, where ``forgets`` is asked for.
        idle: Whether no parameter is shared that the weighting could be asked about.
        forgets: Whether parameters that no rank reached may have got a gradient of 0, which has to go.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        weighting: Weighting | None,
        step: int,
        epoch: int,
        size: int,
        ranks: Ranks,
        shares: Tensor | None = None,
        scales: LossScales | None = None,
        resting: Resting | None = None,
    ) -> None:
        self.weighting, self.step, self.epoch, self.size, self.ranks = weighting, step, epoch, size, ranks
        self.shares, self.scales, self.resting = shares, scales, resting or NONE_RESTS
        # What follows from the arguments alone is decided once, so that a step asks attributes instead of the method.
        self.measures = weighting is not None and weighting.measures_in(step)
        self.wanted: Wanted = "nothing"
        self.measures_at: str | tuple[str, ...] = "features" if weighting is None else weighting.at
        self.passes_again = shares is not None or bool(self.resting.head_only)
        # The cheapest way that does what the weighting says. Shares are the trunk's alone: heads keep their weights.
        self.way: Way = "losses" if shares is None else "features"
        # At the shared parameters, beside the step's own way.
        self.probes = weighting.kernel_probes if weighting is not None and self.measures else 0
        self.renews = weighting is not None and weighting.renews_rows and self.measures
        if weighting is not None:
            self.passes_again = weighting.measures != "losses" or not weighting.weighs_heads or size > 1
            self.passes_again |= weighting.kernel_probes > 0 or bool(self.resting.head_only)
            if self.renews and size > 1:  # all gradients are kept until the step's end, and seen there
                self.wanted, self.way = "rows", "rows"
            elif self.measures and weighting.measures != "losses" and not self.renews:
                self.wanted = weighting.measures
                self.way = "rows" if weighting.at == "trunk" else "features"
            elif not weighting.weighs_heads and (step >= weighting.start_step or weighting.importance):
                self.way = "features"
        # Most methods compare the tasks' gradients and no more, which needs no parameter's in full.
        alone = size == 1 and self.way != "losses" and self.measures_at != "features"
        self.keeps_rows = not (alone and weighting and self.wanted != "rows" and weighting.gradients == "automatic")
        # The trunk's outputs have to be known to measure there, or to stand in for absent tasks.
        self.needs_split = (self.wanted != "nothing" and self.measures_at != "trunk") or self.way == "features"
        self.needs_split |= ranks.size > 1 and (self.way == "rows" or size > 1)
        self.at_shared = self.probes > 0 or self.renews or (self.wanted != "nothing" and self.measures_at == "trunk")
        self.gradients: Collection | None = None
        self.layer: list[Tensor] | None = None
        self.loss: Tensor | None = None
        self.keeps_batches, self.repeats, self.micro_batches = False, False, 0
        self.penalties: dict[str, Tensor] = {}
        self.weights: Tensor | None = None
        self.batches: list[Any] = []
        self.samples: dict[Collected, list[Tensor]] = {}
        self.local: list[tuple[list[str], Tensor, Tensor | float]] = []
        self.reached: set[Tensor] = set()
        self.collects = self.pools = self.forgets = self.idle = False
        self._asked: Signals | None = None
        self.tasks, self._position = tuple(tasks), {task: position for position, task in enumerate(tasks)}
        self._noted: list[tuple[list[int], Reduced]] = []
        self._weighed: set[str] = set()
        self._decisions: list[Decision | None] = []  # None for one that no weights describe

    def positions(self, names: Sequence[str]) -> list[int]:
        """Where these tasks stand among all."""
        return [self._position[name] for name in names]

    def of(self, whole: Tensor, positions: Sequence[int]) -> Tensor:
        """The entries of the tasks at these places, of a vector over all tasks."""
        return whole if len(positions) == len(self.tasks) else whole[numbers(positions, whole.device)]

    @property
    def present(self) -> list[str]:
        """The tasks seen so far, in the module's order."""
        return [self.tasks[place] for place in sorted({place for places, _ in self._noted for place in places})]

    # The losses of the micro-batches

    def note(self, reduced: Reduced, penalties: Mapping[str, Tensor], learned: Set[str] | None = None) -> None:
        """Remember what a micro-batch said; the first one decides whether the step's gradients are collected.

        Args:
            reduced: Its losses over all ranks.
            penalties: Its penalties.
            learned: The tasks that train; None for all.
        """
        self.micro_batches += 1
        self.penalties = {name: value.detach() for name, value in penalties.items()}
        if reduced.names:
            self._noted.append((self.positions(reduced.names), reduced))
        if self.micro_batches == 1 and not self.repeats:
            left = set(self.tasks if learned is None else learned) - self.resting.dropped - self.resting.head_only
            self.collects = self._has_to_collect(complete=len(reduced.names) == len(left))

    def _has_to_collect(self, *, complete: bool) -> bool:
        """Whether the weights are not known before the step's last micro-batch; an only one needs them no earlier.

        A weighting is asked once a step about all tasks of it: at the first micro-batch, where that one has all tasks
        and the method reads nothing but its state.
        """
        if self.size == 1 or self.weighting is None:
            return self.way == "rows"
        self.pools = not self.weighting.known_beforehand(self.step)
        return self.pools or not complete

    def mean_losses(self, names: Sequence[str]) -> Tensor:
        """The mean loss over the window of these tasks."""
        if len(self._noted) == 1 and self._noted[0][1].names == list(names):
            return self._noted[0][1].losses
        total, count = self._sums([reduced.losses for _, reduced in self._noted])
        return self.of(total / count, self.positions(names))

    def mean_factors(self, names: Sequence[str]) -> Tensor | None:
        """What makes the mean over the window of a sum over its micro-batches' samples, ``[K]``; None for 1."""
        if self.size == 1 or not names:
            return None
        _, count = self._sums([reduced.losses for _, reduced in self._noted])
        count = count if self.pools else torch.full_like(count, self.micro_batches)
        return self.of(self.micro_batches / self.size / count, self.positions(names))

    def _mean_scores(self, names: Sequence[str]) -> Tensor | None:
        """The mean over the window of the metric that the weighting asked for."""
        scores = [reduced.scores for _, reduced in self._noted if reduced.scores is not None]
        if not scores or len(scores) != len(self._noted):
            return None
        total, count = self._sums(scores)
        return self.of(total / count, self.positions(names))

    def _sums(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """For all tasks, ``[K]``: the values times their counts, and the counts."""
        # Losses, or a metric's values: both are means over the same samples, and are averaged alike.
        like = values[0]
        like = like.to(torch.promote_types(like.dtype, torch.float32))  # wide enough for counts of pixels
        total, count = like.new_zeros(len(self.tasks)), like.new_zeros(len(self.tasks))
        for (positions, reduced), value in zip(self._noted, values, strict=True):
            index = numbers(positions, like.device, torch.long)
            weight = like.new_ones(len(value)) if reduced.counts is None else reduced.counts.to(like)
            total.index_add_(0, index, value.to(like) * weight)
            count.index_add_(0, index, weight)
        return total, count

    # The weights

    def asks(self, names: Sequence[str]) -> bool:
        """Whether the weighting has yet to be asked about one of these tasks."""
        return not self._weighed.issuperset(names)

    def decide(self, names: Sequence[str], losses: Tensor, measured: Measured) -> Decision:
        """Ask the weighting, or let the weights serve that were known at the step's first micro-batch."""
        if self.repeats and (known := self._decisions.pop(0)) is not None:
            return known
        positions = self.positions(names)
        if self.weights is None or self.asks(names):
            decision = self._ask(names, positions, losses, measured)
        else:
            decision = Decision(self.of(self.weights, positions))
            if self.weighting is not None:
                decision = self.weighting.with_heads(decision.weights, self.step, positions)
        if self.shares is not None:
            # Shares slow a task in the trunk alone: its head goes on with the weights as the method gave them.
            heads = decision.weights if decision.head_weights is None else decision.head_weights
            shared = decision.weights * self.of(self.shares, positions).to(decision.weights)
            decision = replace(decision, weights=shared, head_weights=heads)
        self._decisions.append(decision if decision.directions is None else None)
        return decision

    def with_earlier(self, loss: Tensor) -> Tensor:
        """Add a micro-batch's loss to the step's; return it with the step's value, for an optimizer that compares."""
        if self.repeats:
            return loss
        whole = loss if self.loss is None else loss + self.loss
        self.loss = whole.detach()
        return whole

    def mean_loss(self) -> Tensor | None:
        """The step's loss over all ranks, which an optimizer may compare: all ranks have to come to the same end."""
        if self.loss is None or self.ranks.size == 1:
            return self.loss
        return self.ranks.sum(self.loss.clone()) / self.ranks.size

    def again(self) -> Window:
        """The same step from its beginning, for a closure: nothing is measured, and all is weighed as before.

        Raises:
            ValueError: If no weights describe the step.
        """
        known = [decision for decision in self._decisions if decision is not None]
        if len(known) < len(self._decisions):
            raise ValueError(
                f"{type(self.weighting).__name__} combines gradients into a direction that no weights describe, so "
                "that an optimizer's closure has no loss to compute again; use a method with weights, or an optimizer "
                "that does not need a closure."
            )
        # Weights and heads' weights that agree make a sum of losses, of which one backward pass is enough.
        alike = self.size == 1 and all(decision.head_weights is None for decision in known)
        again = Window(self.tasks, None, self.step, self.epoch, self.size, self.ranks, None, self.scales, self.resting)
        again.way, again.collects = ("losses", False) if alike else (self.way, self.collects)
        again.needs_split = self.needs_split and (again.way != "losses" or self.size > 1)
        again.pools, again.passes_again, again.repeats, again._decisions = self.pools, self.passes_again, True, [*known]
        return again

    def _ask(self, names: Sequence[str], positions: list[int], losses: Tensor, measured: Measured) -> Decision:
        wide = losses.to(torch.promote_types(losses.dtype, torch.float32))
        found, norms, known = self._mean_scores(names), measured.norms, measured.sizes
        scores, traces = (None, found) if self.probes else (found, None)  # kernel traces travel as metrics do
        given = (tuple(names), wide, self.step, self.epoch, norms, measured.gramian, scores, traces)
        self._asked = signals = Signals(*given, host_norms=known)
        if self.weighting is None:
            decision = Decision(torch.ones_like(wide))
        elif self.idle:
            ones = torch.ones_like(wide)
            decision = Decision(self.weighting.with_importance(ones, signals))
            decision.head_weights = None if self.weighting.weighs_heads else ones
        elif getattr(self.weighting, "takes_any_rows", False) or _is_finite(measured):
            decision = self.weighting.decide(signals, positions, measured=self.measures, rows=measured.rows)
        else:
            # No method sees this; the gradients are as broken as what was measured, and the step will be skipped.
            return Decision(torch.ones_like(wide))
        if decision.directions is None:
            self._weighed.update(names)
            if len(names) == len(self.tasks):
                self.weights = decision.weights
            else:
                if self.weights is None:
                    self.weights = wide.new_full((len(self.tasks),), torch.nan)
                self.weights.index_copy_(0, numbers(positions, wide.device), decision.weights)
        return decision

    @property
    def applied_weights(self) -> Tensor | None:
        """What multiplied each task's shared gradient, ``[K]``."""
        return self.weights if self.weights is None or self.shares is None else self.weights * self.shares

    def summary(self) -> Signals | None:
        """The step as a whole: what was measured, with the losses averaged over all micro-batches."""
        if self._asked is None or self.collects or self.micro_batches == 1:
            return self._asked
        # Asked at the first micro-batch, the method saw that one's losses; what it learns from is the whole window.
        names = self.present
        losses = self.mean_losses(names).to(self._asked.losses)
        return replace(self._asked, tasks=tuple(names), losses=losses, scores=self._mean_scores(names))


def _is_finite(measured: Measured) -> bool:
    """Whether what a method would read is finite; a look at the device where it is rows."""
    norms = measured.norms if measured.sizes is None else measured.sizes
    judged = norms if measured.gramian is None else measured.gramian
    return judged is None or bool(torch.isfinite(judged).all())
