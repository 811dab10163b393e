"""NTKWeighting lets all residuals fall at the same rate, by the traces of their neural tangent kernels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Range, SearchSpace
from lightning_mtl.method.signals import Signals

# A trace may be next to nothing beside the others; no weight of use is larger.
LARGEST = 1e30


def ntk_weights(traces: Tensor) -> Tensor:
    r"""Compute :math:`\sum_j t_j / t_k`, ``[K]``; the others' mean for a trace of 0, ones without any.

    Example:
        >>> ntk_weights(torch.tensor([1.0, 3.0]))
        tensor([4.0000, 1.3333])
    """
    known = traces > 0
    # The largest first, so that a sum of large traces is a number.
    relative = traces / torch.where(known.any(), traces.max(), 1.0)
    weights = torch.where(known, relative.sum() / relative, 0.0).clamp(max=LARGEST)
    others = torch.where(known.any(), weights.mean() * (len(traces) / known.sum().clamp(min=1)), 1.0)
    return torch.where(known, weights, others.clamp(max=LARGEST))


class NTKWeighting(Weighting):
    r"""Weigh each loss by the inverse of its residuals' mean kernel, so that all of them fall at the same rate.

    .. math:: w_k = \frac{\sum_j t_j}{t_k}, \qquad t_k = \frac{\operatorname{tr} K_k}{N_k}
        = \frac{1}{N_k} \sum_{n} \lVert \nabla_\theta r_{kn} \rVert^2

    for losses :math:`L_k = \frac{1}{N_k} \sum_n r_{kn}^2`, θ the shared parameters. What is measured is the kernel of
    the residuals, which does not vanish with them as :math:`\lVert \nabla L_k \rVert` does. Return
    ``TaskOutput(loss, residuals=r)`` for each task; a factor c before a loss belongs into its residuals as √c. The
    weights scale the heads, too. They sum to :math:`K^2` and more.

    The traces come from random signs, :math:`\operatorname{tr} K = \mathbb{E} \lVert \nabla_\theta \sum_n v_n r_n
    \rVert^2`: one backward pass a task and probe in a step that measures, and no Jacobian in memory. On several ranks
    each draws for its own residuals; the traces are averaged over the ranks, and are another sample of the same mean
    than one process would draw. A sharded trunk (FSDP2) is refused.

    When: the residuals of a differential equation and of its conditions have to fall at one rate.

    Args:
        momentum: The share of the old traces in a running mean, which smooths the probes' noise; 0 takes the newest.
        probes: Random probes of each task in a step that measures.
        seed: Where the random numbers begin.
        every_n_steps: Measure in one step of n and keep the weights in between; kernels change slowly.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If an argument is out of its range, or in the first step if a task has no residuals.

    Source: Wang, Yu and Perdikaris, When and Why PINNs Fail to Train: A Neural Tangent Kernel Perspective, 2020,
    arXiv:2007.14527, algorithm 1.

    Deviations: the paper computes the kernels whole, and divides the traces by no numbers of points, which are equal
    there; the mean over the points, and the running mean, are as in the authors' later code (jaxpi), whose numerator is
    the traces' mean.

    Example:
        >>> NTKWeighting(every_n_steps=100).kernel_probes
        1
    """

    search_space: ClassVar[SearchSpace] = {"momentum": Range(0.0, 0.99)}

    def __init__(
        self,
        momentum: float = 0.9,
        *,
        probes: int = 1,
        seed: int = 0,
        every_n_steps: int = 1,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, **common)
        if not 0 <= momentum < 1:
            raise ValueError(f"NTKWeighting(momentum={momentum}) must be at least 0 and below 1.")
        if probes < 1:
            raise ValueError(f"NTKWeighting(probes={probes}) must be at least 1.")
        self.momentum, self.kernel_probes = momentum, probes
        self.add_state("means", torch.tensor(torch.nan))
        self.add_generator("random", seed)
        self.means: Tensor
        self._coming: tuple[int, Tensor] | None = None  # the step, and what becomes the means if it is taken

    def probes(self, device: torch.device) -> torch.Generator:
        """The random numbers of this step's probes."""
        return self.random_numbers("random", device)

    def weigh(self, signals: Signals) -> Tensor:
        """Weigh by the running means, this step's traces included."""
        if signals.traces is None:  # what is shared was found in the midst of an accumulation window
            return ntk_weights(self.means.nan_to_num(0.0))
        newest = signals.traces.to(self.means.device).clamp(max=LARGEST).to(self.means.dtype)
        means = torch.where(self.means.isnan(), newest, torch.lerp(newest, self.means, self.momentum))
        self._coming = signals.step, means
        return ntk_weights(means)

    def update(self, signals: Signals) -> None:
        """Keep the means, and go on to the next probes."""
        if self._coming is not None and self._coming[0] == signals.step:  # measured, and not skipped
            self.means = self._coming[1]
        self.advance("random")
