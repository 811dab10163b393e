"""What one optimizer step gathers from its micro-batches, and what its weighting made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_mtl.agreement import Agreement
from lightning_mtl.callbacks import Aggregator, Weighting
from lightning_mtl.gradients.cut import FeatureCut
from lightning_mtl.gradients.feature_update import Wanted
from lightning_mtl.gradients.graph import reached_leaves
from lightning_mtl.gradients.layers import last_layer, named_parameters_at
from lightning_mtl.gradients.micro_batch import Decision, Measured
from lightning_mtl.gradients.ranks import Ranks
from lightning_mtl.gradients.row_update import RowUpdate
from lightning_mtl.gradients.sharded_update import ShardedRowUpdate
from lightning_mtl.phases import Phases
from lightning_mtl.signals import Signals
from lightning_mtl.task_rates import Collected

if TYPE_CHECKING:
    from lightning_mtl.module import MultiTaskModule

Way = Literal["losses", "features", "rows"]
"""How weights reach the gradients: in a weighted sum of losses, at the trunk's output, or in a sum of rows."""


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
        self.rows: RowUpdate | ShardedRowUpdate | None = None
        self.phases = Phases()
        self.micro_batches = 0
        self.penalties: dict[str, Tensor] = {}
        self.scores: Tensor | None = None
        self._asked: list[Signals] = []
        self.weights: Tensor | None = None
        self.batches: list[Any] = []
        self.samples: dict[Collected, list[Tensor]] = {}
        self.local: list[tuple[list[str], Tensor, Tensor | float]] = []
        self.reached: set[Tensor] = set()
        self._tasks = tuple(tasks)
        self._position = {task: position for position, task in enumerate(tasks)}
        self._noted: list[tuple[list[int], Tensor, Tensor | None]] = []
        self._weighed: set[str] = set()

    @property
    def wanted(self) -> Wanted:
        """What to measure before the weighting is asked."""
        if self.weighting is None or not self.measures or self.weighting.measures == "losses":
            return "nothing"
        return self.weighting.measures

    @property
    def passes_again(self) -> bool:
        """Whether some step of the training may pass the trunk, or a decoder that tasks share, more than once."""
        return self.weighting is not None and (self.weighting.measures != "losses" or not self.weighs_heads)

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
        seen = {position for positions, _, _ in self._noted for position in positions}
        return [self._tasks[position] for position in sorted(seen)]

    def note(self, agreed: Agreement, penalties: Mapping[str, Tensor]) -> None:
        """Remember what a micro-batch said."""
        self.micro_batches += 1
        self.penalties = {name: value.detach() for name, value in penalties.items()}
        self.scores = agreed.scores
        if agreed.names:
            self._noted.append((self.positions(agreed.names), agreed.losses, agreed.counts))

    def note_reached(self, losses: Sequence[Tensor], cut: FeatureCut) -> None:
        """Remember which parameters this rank's losses depend on, through the trunk or without it."""
        leaves = reached_leaves(losses)
        origins = {cut.leaves[leaf] for leaf in leaves if leaf in cut.leaves}
        self.reached.update(leaves, reached_leaves([cut.outputs[index] for index in origins]))

    def sums(self) -> tuple[Tensor, Tensor]:
        """For all tasks, ``[K]``: the losses times their counts, and the counts."""
        like = self._noted[0][1]
        like = like.to(torch.promote_types(like.dtype, torch.float32))  # wide enough for counts of pixels
        total, count = like.new_zeros(len(self._tasks)), like.new_zeros(len(self._tasks))
        for positions, losses, counts in self._noted:
            index = torch.tensor(positions, device=like.device)
            weight = like.new_ones(len(losses)) if counts is None else counts.to(like)
            total.index_add_(0, index, losses * weight)
            count.index_add_(0, index, weight)
        return total, count

    def mean_losses(self, names: Sequence[str]) -> Tensor:
        """The mean loss over the window of tasks that were present in it."""
        if len(self._noted) == 1 and self._noted[0][0] == self.positions(names):
            return self._noted[0][1]
        total, count = self.sums()
        index = torch.tensor(self.positions(names), device=total.device)
        return total[index] / count[index]

    def layer(self, module: MultiTaskModule, cut: FeatureCut) -> list[Tensor] | None:
        """The parameters that gradients are measured at, None for the trunk's output itself."""
        at = "features" if self.weighting is None else self.weighting.at
        if at == "features":
            return None
        if at == "last_layer":
            return last_layer(module.trunk, cut, self.ranks, among=module.shared_parameters())
        return named_parameters_at(module, [at] if isinstance(at, str) else at)

    def describe(self, names: Sequence[str], losses: Tensor, measured: Measured) -> Signals:
        """Put what is known of these tasks in the form that methods read."""
        signals = Signals(
            tuple(names),
            losses.to(torch.promote_types(losses.dtype, torch.float32)),
            self.step,
            self.epoch,
            norms=measured.norms,
            gramian=measured.gramian,
            scores=self.scores if self.scores is not None and len(self.scores) == len(names) else None,
        )
        self._asked.append(signals)
        return signals

    @property
    def applied_weights(self) -> Tensor | None:
        """What multiplied each task's shared gradient, ``[K]``."""
        return self.weights if self.weights is None or self.shares is None else self.weights * self.shares

    def decide(self, names: Sequence[str], losses: Tensor, measured: Measured) -> Decision:
        """Ask the weighting, or let the weights serve that it gave to the window's earlier micro-batches."""
        decision = self._decide(names, losses, measured)
        if self.shares is None:
            return decision
        shared = decision.weights * self.shares[self.positions(names)].to(decision.weights)
        return replace(decision, weights=shared, head_weights=decision.for_heads(weighs_heads=self.weighs_heads))

    def _decide(self, names: Sequence[str], losses: Tensor, measured: Measured) -> Decision:
        if self.weights is not None and self._weighed.issuperset(names):
            return self._with_heads(names, self.weights[self.positions(names)])
        signals = self.describe(names, losses, measured)
        if self.weighting is None:
            return Decision(self._keep(names, torch.ones_like(signals.losses)))
        judged = measured.norms if measured.gramian is None else measured.gramian
        if judged is not None and not bool(torch.isfinite(judged).all()):
            # No method sees this; the gradients are as broken as what was measured, and the step will be skipped.
            return Decision(torch.ones_like(signals.losses))
        positions = self.positions(names)
        if isinstance(self.weighting, Aggregator) and measured.rows:
            with self.phases("solving"):
                directions = _aggregate(self.weighting, signals, positions, measured.rows)
            return Decision(torch.ones_like(signals.losses), directions)
        with self.phases("solving"):
            weights = self.weighting.current_weights(signals, positions, measured=self.measures)
        return self._with_heads(names, self._keep(names, weights))

    def summary(self) -> Signals | None:
        """The window as a whole: what was measured, with the losses averaged over all micro-batches.

        Where tasks took turns, each task's norm is that of the micro-batch it was measured in, and no Gramian exists.
        """
        if not self._asked or self.micro_batches == 1:
            return self._asked[-1] if self._asked else None
        names = self.present
        whole = replace(self._asked[-1], tasks=tuple(names), losses=self.mean_losses(names).to(self._asked[-1].losses))
        if self._asked[-1].tasks == whole.tasks:
            return whole
        norms = {
            task: norm
            for signals in self._asked
            if signals.norms is not None
            for task, norm in zip(signals.tasks, signals.norms.unbind(), strict=True)
        }
        found = torch.stack([norms[task] for task in names]) if norms.keys() >= set(names) else None
        return replace(whole, norms=found, gramian=None, scores=None)

    def asks(self, names: Sequence[str]) -> bool:
        """Whether the weighting has yet to be asked about one of these tasks."""
        return not self._weighed.issuperset(names)

    def _with_heads(self, names: Sequence[str], weights: Tensor) -> Decision:
        if self.weighting is None:
            return Decision(weights)
        own = self.weighting.current_head_weights(self.step, self.positions(names), weights)
        return Decision(weights, head_weights=own)

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
