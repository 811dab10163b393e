"""Any weighting of the TorchJD library works here, too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Measure, Weighting
from lightning_mtl.method.signals import Signals


class FromTorchJD(Weighting):
    r"""Weigh tasks by a ``Weighting`` of TorchJD, or by any other function of the Gramian.

    .. math:: w = f(G), \qquad G = J J^\top

    What that library computes from the Gramian works here on several devices, with mixed precision and gradient
    accumulation: its UPGrad, DualProj, MGDA, PCGrad, GradVac, CAGrad, FairGrad, IMTL-G, Aligned-MTL, PCD and Krum, as a
    weighting or as an aggregator. So do weightings that read no more than how many tasks there are. Its SDMGrad and
    MoDo get the Gramian of one batch, where they ask for a product of two independent ones. What reads whole gradients
    is refused: the aggregators ConFIG, GradDrop, NashMTL and TrimmedMean, and ExcessMTL, of most of which this package
    has classes of its own. The library is installed by ``pip install torchjd``. Heads follow their
    own, unweighted losses.

    When: a weighting that TorchJD has and this package has not.

    Args:
        weighting: A ``torchjd.aggregation.Weighting`` over the Gramian, ``UPGradWeighting()`` for instance; an
            aggregator that has one, ``UPGrad()``; or any function from ``[K, K]``, float64 on the CPU, to ``[K]``.
        seed: What the random numbers that it draws begin with.
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`.

    Raises:
        TypeError: If ``weighting`` is nothing of the kind.

    Source: Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024, arXiv:2406.16232, and the
    documentation of TorchJD 0.18.

    Deviations: random numbers come from this callback's generator, so that all ranks draw the same. What a weighting
    remembers by itself (``torchjd.Stateful``: its GradVac, CR-MOGM and others) is not in checkpoints, and starts anew
    when training resumes; this package's own classes of those names resume exactly.

    Example:
        >>> FromTorchJD(lambda gramian: 1 / gramian.diagonal().sqrt()).measures
        'gramian'
    """

    measures: ClassVar[Measure] = "gramian"
    weighs_heads: ClassVar[bool] = False

    def __init__(
        self, weighting: Callable[[Tensor], Tensor], *, seed: int = 0, **common: Unpack[GradientArguments]
    ) -> None:
        super().__init__(**common)
        found = type(weighting).__name__
        if "torchjd" in sys.modules:
            weighting = _of_gramian(weighting)
        if found == "ExcessMTLWeighting" or isinstance(weighting, type) or not callable(weighting):
            raise TypeError(
                f"FromTorchJD(weighting=...) takes an instance of a TorchJD weighting over the Gramian, such as "
                f"torchjd.aggregation.UPGradWeighting(), found {found}; pip install torchjd gets them."
            )
        self.weighting = weighting
        self.add_generator("random", seed)

    def weigh(self, signals: Signals) -> Tensor:
        """Ask the weighting about this step's Gramian."""
        with torch.random.fork_rng(devices=[]):  # It draws from torch's own generator.
            torch.default_generator.set_state(self.random_numbers("random").get_state())
            return self.weighting(self.needed(signals, "gramian"))

    def update(self, signals: Signals) -> None:
        """Go on to the next step's random numbers."""
        self.advance("random")


def _of_gramian(weighting: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The weighting inside one of TorchJD's aggregators; None where an aggregator has none over the Gramian."""
    from torchjd.aggregation import Aggregator  # Optional: it is installed, for somebody has imported it.

    found: Callable[[Tensor], Tensor] = (
        getattr(weighting, "gramian_weighting", None) if isinstance(weighting, Aggregator) else weighting  # type: ignore[assignment]
    )
    return found
