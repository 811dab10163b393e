"""IMTL treats heads impartially by scaled losses, and shared parameters by equal projections."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import NEGLIGIBLE, Measure
from lightning_mtl.method.search_space import Choice, Range, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.imtlg import imtlg_weights
from lightning_mtl.weighting.imtll import imtll_gradient
from lightning_mtl.weighting.learned import LARGEST_LOGARITHM, Learned


def imtl_weights(gramian: Tensor, log_scales: Tensor) -> Tensor:
    r"""Compute :math:`w_k = e^{s_k} \alpha_k`, with α the weights of IMTL-G for the gradients :math:`e^{s_k} g_k`.

    Args:
        gramian: ``[K, K]``, of the gradients as they are.
        log_scales: s, ``[K]``.

    Returns:
        ``[K]``, float64, on the CPU, to be applied to the gradients as they are.

    Example:
        >>> imtl_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), torch.zeros(2))
        tensor([0.5923, 0.4077], dtype=torch.float64)
    """
    scales = log_scales.detach().cpu().double().exp()
    return scales * imtlg_weights(gramian.detach().cpu().double() * torch.outer(scales, scales))


class IMTL(Learned):
    r"""Scale each loss as IMTL-L does, then balance the shared gradients as IMTL-G does: impartial learning.

    .. math:: \min_s \sum_k e^{s_k} L_k - s_k, \qquad w_k = e^{s_k} \alpha_k, \qquad
        \sum_k \alpha_k e^{s_k} g_k \cdot \hat g_j \text{ equal for all } j, \quad \sum_k \alpha_k = 1

    The shared parameters' gradients have weight :math:`w_k`, each head's has :math:`e^{s_k}` alone.

    When: losses and gradients of unlike scale.

    Args:
        lr: Step size of the Adam that learns s.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`. The importance multiplies the weights of the shared gradients.

    Raises:
        ValueError: If an argument is out of its range.

    Source: Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021, algorithm 1.

    Deviations: those of :class:`IMTLG` and :class:`IMTLL`.

    Example:
        >>> IMTL(at="features").measures
        'gramian'
    """

    measures: ClassVar[Measure] = "gramian"
    weighs_heads: ClassVar[bool] = False
    negligible = NEGLIGIBLE
    search_space: ClassVar[SearchSpace] = {
        "lr": Range(1e-3, 1e-1, log=True),
        "at": Choice(("trunk", "features")),
    }

    def __init__(self, *, lr: float = 0.01, **common: Unpack[GradientArguments]) -> None:
        super().__init__("log_scales", lr=lr, on_cpu=True, **common)
        self.log_scales: Tensor

    def weigh(self, signals: Signals) -> Tensor:
        """Balance this step's gradients, scaled as learned so far."""
        return imtl_weights(self.needed(signals, "gramian"), self.log_scales)

    def head_weights(self) -> Tensor:
        """Weigh the heads by the scales alone."""
        return torch.exp(self.log_scales)

    def update(self, signals: Signals) -> None:
        """Take one Adam step on the scales."""
        gradient = imtll_gradient(self.log_scales, signals.losses_on_cpu().to(self.log_scales))
        self.log_scales = self.descended(self.log_scales, gradient).clamp(-LARGEST_LOGARITHM, LARGEST_LOGARITHM)
