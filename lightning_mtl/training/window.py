"""State of one optimizer step: the losses of its micro-batches, the gradients measured, the weights chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_mtl.distributed import Ranks
from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.layers import last_layer, named_parameters_at
from lightning_mtl.gradients.micro_batch import Measured, Wanted
from lightning_mtl.gradients.sharded import ShardedTrunkGradients
from lightning_mtl.gradients.trunk import TrunkGradients
from lightning_mtl.learning_rates.factor import Collected
from lightning_mtl.method.base import Aggregator, Weighting
from lightning_mtl.method.signals import Decision, Signals
from lightning_mtl.monitors.throughput import Phases
from lightning_mtl.training.losses import Agreement

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule

Way = Literal["losses", "features", "rows"]
"""How weights reach the gradients: in a weighted sum of losses, at the trunk's output, or in a sum of rows."""


@dataclass
class _Noted:
    """What one micro-batch said of the tasks at these positions."""

    positions: list[int]
    losses: Tensor
    counts: Tensor | None
    scores: Tensor | None


class Window:
    """The state of one optimizer step: losses seen, gradients measured, weights chosen.

    Args:
        tasks: All tasks of the module, in order.
        weighting: The Trainer's weighting; None weighs all tasks equally.
        step: Optimizer steps taken before.
        epoch: The present epoch.
        size: Micro-batches in a full window.
        ranks: The processes that train together.
        shares: ``[K]``, what multiplies each task's weight in the shared gradient, and there alone; None for 1.
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
    ) -> None:
        self.weighting = weighting
        self.step, self.epoch, self.size, self.ranks, self.shares = step, epoch, size, ranks, shares
        self.measures = weighting is not None and weighting.measures_in(step)
        self.way = _way(weighting, step, measures=self.measures)
        if shares is not None and self.way == "losses":
            self.way = "features"  # the heads keep the weights as they are
        self.gradients: TrunkGradients | ShardedTrunkGradients | None = None
        """The gradients kept until the step's weights are known, where the step collects them."""
        self.collects = False
        self.layer: list[Tensor] | None = None
        """The parameters that gradients are measured at, over the micro-batches so far; None for a place of all."""
        self.phases = Phases()
        self.micro_batches = 0
        self.penalties: dict[str, Tensor] = {}
        self._asked: Signals | None = None
        self.weights: Tensor | None = None
        self.batches: list[Any] = []
        self.samples: dict[Collected, list[Tensor]] = {}
        self.local: list[tuple[list[str], Tensor, Tensor | float]] = []
        self.reached: set[Tensor] = set()
        self._tasks = tuple(tasks)
        self._position = {task: position for position, task in enumerate(tasks)}
        self._noted: list[_Noted] = []
        self._weighed: set[str] = set()

    @property
    def wanted(self) -> Wanted:
        """What to measure before the weighting is asked."""
        if self.weighting is None or not self.measures or self.weighting.measures == "losses":
            return "nothing"
        return self.weighting.measures

    @property
    def measures_at(self) -> str | tuple[str, ...]:
        """Where gradients are measured."""
        return "features" if self.weighting is None else self.weighting.at

    @property
    def passes_again(self) -> bool:
        """Whether some step of the training may pass a part of the graph more than once."""
        if self.weighting is None:
            return self.shares is not None
        return self.weighting.measures != "losses" or not self.weighting.weighs_heads or self.size > 1

    @property
    def weighs_heads(self) -> bool:
        """Whether a task's weight scales the gradients of its head."""
        return self.weighting is None or self.weighting.weighs_heads

    def positions(self, names: Sequence[str]) -> list[int]:
        """Where these tasks stand among all."""
        return [self._position[name] for name in names]

    @property
    def present(self) -> list[str]:
        """The tasks seen so far, in the module's order."""
        seen = {position for noted in self._noted for position in noted.positions}
        return [self._tasks[position] for position in sorted(seen)]

    def note(self, agreed: Agreement, penalties: Mapping[str, Tensor], learned: int | None = None) -> None:
        """Remember what a micro-batch said; the first one decides whether the step's gradients are collected.

        Args:
            agreed: Its losses over all ranks.
            penalties: Its penalties.
            learned: How many tasks train; None for all.
        """
        self.micro_batches += 1
        self.penalties = {name: value.detach() for name, value in penalties.items()}
        if agreed.names:
            self._noted.append(_Noted(self.positions(agreed.names), agreed.losses, agreed.counts, agreed.scores))
        if self.micro_batches == 1:
            complete = len(agreed.names) == (len(self._tasks) if learned is None else learned)
            self.collects = self._has_to_collect(complete=complete)

    def _has_to_collect(self, *, complete: bool) -> bool:
        """Whether the weights are not known before the step's last micro-batch.

        A weighting is asked once a step about all tasks of it. Its weights are known at the first micro-batch where
        that one has all tasks and the method reads nothing but its state; and they are needed no earlier than at the
        only one.
        """
        if self.size == 1 or self.weighting is None:
            return self.way == "rows"
        return not (complete and self.weighting.known_beforehand(self.step))

    def note_reached(self, losses: Sequence[Tensor]) -> None:
        """Remember which parameters this rank's losses depend on."""
        self.reached.update(reached_leaves(losses))

    def sums(self) -> tuple[Tensor, Tensor]:
        """For all tasks, ``[K]``: the losses times their counts, and the counts."""
        return self._sums([noted.losses for noted in self._noted])

    def _sums(self, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        like = values[0]
        like = like.to(torch.promote_types(like.dtype, torch.float32))  # wide enough for counts of pixels
        total, count = like.new_zeros(len(self._tasks)), like.new_zeros(len(self._tasks))
        for noted, value in zip(self._noted, values, strict=True):
            index = torch.tensor(noted.positions, device=like.device)
            weight = like.new_ones(len(value)) if noted.counts is None else noted.counts.to(like)
            total.index_add_(0, index, value.to(like) * weight)
            count.index_add_(0, index, weight)
        return total, count

    def _mean_scores(self, names: Sequence[str]) -> Tensor | None:
        """The mean over the window of the metric that the weighting asked for."""
        scores = [noted.scores for noted in self._noted if noted.scores is not None]
        if not scores or len(scores) != len(self._noted):
            return None
        total, count = self._sums(scores)
        index = torch.tensor(self.positions(names), device=total.device)
        return total[index] / count[index]

    def mean_losses(self, names: Sequence[str]) -> Tensor:
        """The mean loss over the window of tasks that were present in it."""
        if len(self._noted) == 1 and self._noted[0].positions == self.positions(names):
            return self._noted[0].losses
        total, count = self.sums()
        index = torch.tensor(self.positions(names), device=total.device)
        return total[index] / count[index]

    def add_layer(self, module: MultiTaskModule, groups: Sequence[Sequence[Tensor]]) -> None:
        """Find the parameters that gradients are measured at; those of several micro-batches add up."""
        at = self.measures_at
        if at == "last_layer":
            found = last_layer(module.trunk, groups, self.ranks, among=module.shared_parameters())
        elif at in ("trunk", "features"):
            return
        else:
            found = named_parameters_at(module, [at] if isinstance(at, str) else at)
        self.layer = list(dict.fromkeys([*(self.layer or []), *found]))

    def describe(self, names: Sequence[str], losses: Tensor, measured: Measured) -> Signals:
        """Put what is known of these tasks in the form that methods read."""
        self._asked = Signals(
            tuple(names),
            losses.to(torch.promote_types(losses.dtype, torch.float32)),
            self.step,
            self.epoch,
            norms=measured.norms,
            gramian=measured.gramian,
            scores=self._mean_scores(names),
        )
        return self._asked

    @property
    def applied_weights(self) -> Tensor | None:
        """What multiplied each task's shared gradient, ``[K]``."""
        return self.weights if self.weights is None or self.shares is None else self.weights * self.shares

    def decide(self, names: Sequence[str], losses: Tensor, measured: Measured) -> Decision:
        """Ask the weighting, or let the weights serve that were known at the step's first micro-batch."""
        decision = self._decide(names, losses, measured)
        if self.shares is None:
            return decision
        heads = decision.weights if decision.head_weights is None else decision.head_weights
        shared = decision.weights * self.shares[self.positions(names)].to(decision.weights)
        return replace(decision, weights=shared, head_weights=heads)

    def _decide(self, names: Sequence[str], losses: Tensor, measured: Measured) -> Decision:
        if self.weights is not None and self._weighed.issuperset(names):
            return self._with_heads(names, self.weights[self.positions(names)])
        signals = self.describe(names, losses, measured)
        ones = torch.ones_like(signals.losses)
        if self.weighting is None:
            return Decision(self._keep(names, ones))
        judged = measured.norms if measured.gramian is None else measured.gramian
        if judged is not None and not bool(torch.isfinite(judged).all()):
            # No method sees this; the gradients are as broken as what was measured, and the step will be skipped.
            return Decision(ones)
        positions = self.positions(names)
        if isinstance(self.weighting, Aggregator) and measured.rows:
            with self.phases("solving"):
                return Decision(ones, ones, _aggregate(self.weighting, signals, positions, measured.rows))
        with self.phases("solving"):
            weights = self.weighting.current_weights(signals, positions, measured=self.measures)
        return self._with_heads(names, self._keep(names, weights))

    def summary(self) -> Signals | None:
        """The step as a whole: what was measured, with the losses averaged over all micro-batches."""
        if self._asked is None or self.collects or self.micro_batches == 1:
            return self._asked
        names = self.present
        losses = self.mean_losses(names).to(self._asked.losses)
        return replace(self._asked, tasks=tuple(names), losses=losses, scores=self._mean_scores(names))

    def asks(self, names: Sequence[str]) -> bool:
        """Whether the weighting has yet to be asked about one of these tasks."""
        return not self._weighed.issuperset(names)

    def _with_heads(self, names: Sequence[str], weights: Tensor) -> Decision:
        if self.weighting is None:
            return Decision(weights)
        own = self.weighting.current_head_weights(self.step, self.positions(names), weights)
        return Decision(weights, torch.ones_like(weights) if own is None and not self.weighs_heads else own)

    def _keep(self, names: Sequence[str], weights: Tensor) -> Tensor:
        self._weighed.update(names)
        if len(names) == len(self._tasks):
            self.weights = weights
            return weights
        if self.weights is None:
            self.weights = weights.new_full((len(self._tasks),), torch.nan)
        self.weights[self.positions(names)] = weights
        return weights


def _way(weighting: Weighting | None, step: int, *, measures: bool) -> Way:
    """The cheapest way that does what the weighting says in this step."""
    if weighting is None:
        return "losses"
    if measures and weighting.measures != "losses":
        return "rows" if weighting.at == "trunk" else "features"
    if weighting.weighs_heads or (step < weighting.start_step and not weighting.importance):
        return "losses"
    return "features"


def _aggregate(
    weighting: Aggregator, signals: Signals, positions: Sequence[int], rows: Sequence[Tensor]
) -> list[Tensor]:
    """Combine gradients that lie in several matrices as if they were one."""
    if len(rows) == 1:
        return [weighting.direction(signals, positions, rows[0])]
    widest = rows[0].dtype
    for block in rows[1:]:
        widest = torch.promote_types(widest, block.dtype)
    whole = weighting.direction(signals, positions, torch.cat([block.to(widest) for block in rows], dim=1))
    parts = whole.split([block.shape[1] for block in rows])
    return [part.to(block.dtype) for part, block in zip(parts, rows, strict=True)]
