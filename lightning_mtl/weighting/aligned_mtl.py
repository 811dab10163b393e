"""Aligned-MTL makes the gradients' principal components equally strong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.search_space import Choice, SearchSpace
from lightning_mtl.method.signals import Signals
from lightning_mtl.weighting.preference import Preferring

Scale = Literal["min", "median", "rmse"]


def aligned_mtl_weights(gramian: Tensor, preference: Tensor, scale: Scale = "min") -> Tensor:
    r"""Compute :math:`w = \sqrt\lambda V \Lambda^{-1/2} V^\top p` with :math:`G = V \Lambda V^\top`.

    Args:
        gramian: ``[K, K]``.
        preference: p, ``[K]``.
        scale: λ: the least of the eigenvalues (``"min"``), their median (the lower one), or their mean (``"rmse"``).
            Eigenvalues that are zero in float32, below K ε of the largest, are left out.

    Returns:
        ``[K]``, float64, on the CPU; p itself if all gradients are zero.

    Example:
        >>> aligned_mtl_weights(torch.tensor([[18.0, -22.0], [-22.0, 38.0]]), torch.tensor([0.5, 0.5]))
        tensor([0.5591, 0.4083], dtype=torch.float64)
    """
    eigenvalues, V = torch.linalg.eigh(gramian.detach().cpu().double())
    preference = preference.to(eigenvalues)
    kept = eigenvalues > len(eigenvalues) * torch.finfo(torch.float32).eps * eigenvalues[-1]
    if not kept.any():
        return preference
    strengths, basis = eigenvalues[kept], V[:, kept]
    level = {"min": strengths[0], "median": strengths.median(), "rmse": strengths.mean()}[scale]
    weights: Tensor = basis @ ((level / strengths).sqrt() * (basis.T @ preference))
    return weights


class AlignedMTL(Preferring):
    r"""Replace the gradients by the nearest ones that are orthogonal and equally long: independent component alignment.

    .. math:: w = \sqrt{\lambda} \, V \Lambda^{-1/2} V^\top p, \qquad G = V \Lambda V^\top

    so that no component of the gradients dominates or conflicts; λ is the weakest component's eigenvalue. Heads follow
    their own, unweighted losses.

    When: gradients that conflict, or one task's gradient that dominates the others.

    Args:
        scale: λ: ``"min"`` as in the paper, or the ``"median"`` or mean (``"rmse"``) of the eigenvalues, as in the
            official code.
        preference: ``{task: p}``, relative numbers; tasks not named count as 1. Scaled to the sum 1.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`. ``at="features"`` is the paper's Aligned-MTL-UB.

    Raises:
        ValueError: If an argument is out of its range, or at setup if ``preference`` names an unknown task.

    Source: Senushkin et al., Independent Component Alignment for Multi-Task Learning, 2023, arXiv:2305.19000,
    algorithm 1.

    Deviations: the official code has no preference and sums the aligned gradients, K times the mean used here. As in
    the code, components weaker than K times 1.2e-7 (float32) of the strongest are dropped: of two tasks, one whose
    gradient is more than 2,000 times shorter than the other's has no say.

    Example:
        >>> AlignedMTL("median", preference={"depth": 2.0}).scale
        'median'
    """

    search_space: ClassVar[SearchSpace] = {
        "scale": Choice(("min", "median", "rmse")),
        "at": Choice(("trunk", "features")),
    }

    def __init__(
        self,
        scale: Scale = "min",
        *,
        preference: Mapping[str, float] | None = None,
        **common: Unpack[GradientArguments],
    ) -> None:
        super().__init__(preference=preference, **common)
        if scale not in ("min", "median", "rmse"):
            raise ValueError(f"AlignedMTL(scale={scale!r}) must be 'min', 'median' or 'rmse'.")
        self.scale = scale

    def weigh(self, signals: Signals) -> Tensor:
        """Align this step's gradients."""
        return aligned_mtl_weights(self.needed(signals, "gramian"), self.on_the_simplex(signals), self.scale)
