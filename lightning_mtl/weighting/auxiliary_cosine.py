"""AuxiliaryCosine lets an auxiliary task train where its gradient agrees with the main one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Measure
from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.auxiliary import Auxiliary

Form = Literal["cosine", "sign"]


def auxiliary_cosine_weights(gramian: Tensor, main: Tensor, form: Form = "cosine") -> Tensor:
    r"""Compute 1 for main tasks, and :math:`\max(0, \cos(g_{main}, g_k))`, or 1 where that is positive, for others.

    Args:
        gramian: ``[K, K]``.
        main: ``[K]``, 1 for main tasks beside 0; their sum is :math:`g_{main}`. Without one, auxiliary tasks have 0.
        form: ``"cosine"`` or ``"sign"``.

    Returns:
        ``[K]``, float64, on the CPU.

    Example:
        >>> auxiliary_cosine_weights(torch.tensor([[4.0, 1.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    G = gramian.detach().cpu().double()
    chosen = main.cpu().double()
    products = G @ chosen
    length = (chosen @ products).clamp(min=0).sqrt()
    lengths = G.diagonal().sqrt() * length
    cosines = torch.where(lengths > 0, products / lengths, torch.zeros_like(products)).clamp(0, 1)
    return torch.where(chosen > 0, torch.ones_like(cosines), cosines if form == "cosine" else cosines.sign())


class AuxiliaryCosine(Auxiliary):
    r"""Weigh an auxiliary task by the cosine of its gradient with the main task's, and not at all where they conflict.

    .. math:: w_k = \max\!\big(0, \cos(g_{main}, g_k)\big)

    for auxiliary tasks, 1 for main ones; with several of them :math:`g_{main}` is the sum of their gradients. What is
    left of an auxiliary gradient never points against the main one, so that training ends where the main task is
    stationary. Heads follow their own, unweighted losses. A step without a gradient of a main task, which may be absent
    from it, has nothing to compare with: auxiliary tasks have weight 0 in it, and a warning says so once.

    When: one task counts, and it is not known whether the others help it.

    Args:
        main: The main task or tasks; None where ``Task(role="auxiliary")`` tells them from the others.
        form: ``"cosine"`` for the formula, ``"sign"`` for weight 1 wherever the cosine is above 0.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range; at setup, if there is no main or no auxiliary task, or ``main``
            names an unknown task or contradicts the roles.

    Source: Du et al., Adapting Auxiliary Losses Using Gradient Similarity, 2018, arXiv:1812.02224, section 3.

    Deviations: the paper has one main and one auxiliary task, and no public code of its authors is known. With several
    auxiliary tasks each is compared by itself.

    Example:
        >>> AuxiliaryCosine("depth", form="sign", at="features").main
        ('depth',)
    """

    measures: ClassVar[Measure] = "gramian"
    search_space: ClassVar[SearchSpace] = {
        "form": Choice(("cosine", "sign")),
        "at": Choice(("trunk", "features")),
    }

    def __init__(
        self, main: str | Sequence[str] | None = None, *, form: Form = "cosine", **common: Unpack[GradientArguments]
    ) -> None:
        super().__init__(main, **common)
        if form not in ("cosine", "sign"):
            raise ValueError(f"AuxiliaryCosine(form={form!r}) must be 'cosine' or 'sign'.")
        self.form = form
        self._warned = False

    def weigh(self, signals: Signals) -> Tensor:
        """Compare this step's gradients."""
        if not self._warned and not self.has_main(signals):
            self._warned = True
            rank_zero_warn(
                f"AuxiliaryCosine has no gradient of a main task at step {signals.step}: in such a step the auxiliary "
                "tasks do not train the shared parameters. Batches that hold all tasks let it compare them."
            )
        G = self.needed(signals, "gramian")
        return auxiliary_cosine_weights(G, self.main_of(signals, G), self.form)
