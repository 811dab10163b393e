"""ExcessMTL gives weight to the tasks that are far from where they converge."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Measure
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Decision, Signals
from lightning_mtl.weighting.row_memory import RowMemory

EPS = 1e-7
# A first excess that is next to nothing would make of a later one a step that no number stands for.
LARGEST = 1e6


def excess_risks(rows: Tensor, squares: Tensor) -> Tensor:
    r"""Estimate :math:`\sum_p g_{kp}^2 / \sqrt{s_{kp} + \epsilon}`, ``[K]``.

    Args:
        rows: g, ``[K, P]``.
        squares: s, ``[K, P]``, the sum of the squared gradients so far, these included.

    Example:
        >>> excess_risks(torch.tensor([[3.0, 4.0]]), torch.tensor([[9.0, 16.0]]))
        tensor([7.])
    """
    return (rows.square() / (squares + EPS).sqrt()).sum(dim=1)


class ExcessMTL(RowMemory):
    r"""Weigh tasks by how far they are from convergence, which label noise does not raise: excess risks.

    .. math:: e_k = \sum_p \frac{g_{kp}^2}{\sqrt{\sum_t g_{kp}^2(t) + \epsilon}}, \qquad
        w_k \leftarrow K \frac{w_k \exp(\eta \, e_k / e_k(0))}{\sum_j w_j \exp(\eta \, e_j / e_j(0))}

    with :math:`e_k(0)` the task's first excess, in whose step the weights stay as they are. The weights scale the
    heads, too.

    The sums of squares are K P numbers for P shared parameters, beside the gradients and in checkpoints. They are of
    parameters: ``at="features"`` and a sharded trunk (FSDP2) have no such rows, and are refused.

    When: some tasks have noisy labels. It keeps K P numbers more.

    Args:
        step_size: η, the code's default.
        at: ``"trunk"``, where the rows are.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range, or the trainable shared parameters change in training.

    Source: He et al., Robust Multi-Task Learning with Excess Risks, ICML 2024, arXiv:2402.02009, equations 6 to 9.

    Deviations: the paper's weights sum to 1 and its e(0) is a mean over a warmup; both are as in the official code here
    (Σ w = K, the first step's value). Its quotient of two zeros, for a task without a gradient, is left out here.

    Example:
        >>> ExcessMTL(step_size=0.1).step_size
        0.1
    """

    measures: ClassVar[Measure] = "rows"
    search_space: ClassVar[SearchSpace] = {"step_size": Range(1e-3, 1.0, log=True)}

    def __init__(
        self, step_size: float = 0.01, *, at: Literal["trunk"] = "trunk", **common: Unpack[CommonArguments]
    ) -> None:
        super().__init__(at=at, **common)
        if not 0 < step_size < torch.inf:
            raise ValueError(f"ExcessMTL(step_size={step_size}) must be above 0 and finite.")
        self.step_size = step_size
        self.add_state("logits", torch.tensor(0.0))
        self.add_state("first", torch.tensor(torch.nan))
        self.logits: Tensor
        self.first: Tensor
        self._coming: tuple[int, Tensor, Tensor, Tensor] | None = None  # the step, its rows, first excesses, logits

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by what has been found so far."""
        return signals.num_tasks * self.logits.softmax(0)

    def decide_by(self, signals: Signals, rows: Tensor) -> Decision:
        """Move the weights by this step's excesses."""
        excess = excess_risks(rows, self.memory.to(rows) + rows.square()).to(self.logits)
        known = ~self.first.isnan()
        moved = self.logits + known * self.step_size * (excess / self.first.nan_to_num(1.0)).clamp(max=LARGEST)
        first = torch.where(known | (excess == 0), self.first, excess)
        self._coming = signals.step, rows, first, moved
        weights = self._with_total(signals.num_tasks * moved.softmax(0).to(signals.losses))
        return Decision(self.with_importance(weights, signals))

    def update(self, signals: Signals) -> None:
        """Keep the weights, and add the squares."""
        if self._coming is not None and self._coming[0] == signals.step:  # not one that was skipped
            _, rows, self.first, self.logits = self._coming
            self.memory = self.memory.to(rows).addcmul(rows, rows)
        self._coming = None
