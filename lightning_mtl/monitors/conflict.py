"""Monitors gradient conflict: whether the tasks' gradients point in the same direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.method.signals import Signals, cosines
from lightning_mtl.monitors.pairs import PairMonitor


def magnitude_similarity(gramian: Tensor) -> Tensor:
    r"""Compare the lengths of each two gradients: 1 for equal lengths, near 0 where one is tiny.

    .. math:: \Phi_{ij} = \frac{2 \lVert g_i \rVert \lVert g_j \rVert}{\lVert g_i \rVert^2 + \lVert g_j \rVert^2}

    Args:
        gramian: ``[K, K]``, the inner products.

    Returns:
        ``[K, K]``, not a number where both gradients are zero.

    Source: Yu et al., Gradient Surgery for Multi-Task Learning, 2020, arXiv:2001.06782, definition 2.

    Example:
        >>> magnitude_similarity(torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
        tensor([[1.0000, 0.6000],
                [0.6000, 1.0000]])
    """
    norms = gramian.diagonal().sqrt()
    shorter, longer = torch.minimum(norms[:, None], norms), torch.maximum(norms[:, None], norms)
    ratio = shorter / longer  # squares of tiny norms may be no numbers any more
    return 2 * ratio / (1 + ratio.square())


def conflict_measures(gramian: Tensor) -> dict[str, Tensor]:
    """Summarize the pairs of K >= 2 gradients in four numbers; pairs with a gradient of zero are left out.

    Args:
        gramian: ``[K, K]``, the inner products.

    Returns:
        ``fraction`` of the pairs whose cosine is below 0, ``mean_cosine``, ``min_cosine``, and ``gms``, the mean
        gradient magnitude similarity. All are scalars; not a number if no pair is left.

    Example:
        >>> {name: float(x) for name, x in conflict_measures(torch.tensor([[1.0, -0.6], [-0.6, 1.0]])).items()}
        {'fraction': 1.0, 'mean_cosine': -0.6, 'min_cosine': -0.6, 'gms': 1.0}
    """
    first, second = torch.triu_indices(len(gramian), len(gramian), offset=1)
    angles, lengths = cosines(gramian)[first, second], magnitude_similarity(gramian)[first, second]
    known = angles.isfinite()
    angles, lengths = angles[known], lengths[known]
    lowest = angles.min() if len(angles) else angles.new_tensor(torch.nan)
    return {
        "fraction": (angles < 0).to(angles).mean(),
        "mean_cosine": angles.mean(),
        "min_cosine": lowest,
        "gms": lengths.mean(),
    }


class GradientConflict(PairMonitor):
    r"""Watch the angles between the tasks' gradients, and their lengths.

    Two tasks conflict where the cosine of their gradients is negative: a step for one then undoes some of the other's
    progress. Logged at each measured step are ``conflict/fraction`` of the pairs that conflict,
    ``conflict/mean_cosine``, ``conflict/min_cosine`` and ``conflict/gms``, the mean gradient magnitude similarity
    (near 0: one task's gradient drowns the others'). At an epoch's end a heatmap, ``conflict/heatmap``, shows each
    pair's mean cosine over the epoch's measured steps.

    Where some tasks are auxiliary (``Task(role="auxiliary")``), ``conflict/main/<task>`` is the cosine of each one's
    gradient with the main one, the sum of the main tasks' gradients, and ``conflict/helped/<task>`` the share of the
    measured steps so far in which it was above 0; :attr:`helped` has the shares.

    Where the weighting has measured a Gramian at the same place in the step, that one is used, for nothing. Else a
    measured step takes one more backward pass of the trunk a task, and for parameters K rows of them in memory while it
    does; the update itself is an ordinary step's, to the bit. With accumulated gradients the window's first micro-batch
    is measured, over all ranks.

    Args:
        every_n_steps: Look at one optimizer step of n.
        at: ``"trunk"`` (all shared parameters), ``"features"`` (the trunk's output, the cheapest), ``"last_layer"``, or
            names of modules.
        figure: Whether to draw the heatmaps, for TensorBoard; needs matplotlib (the extra ``plot``).
        name: What the logged names begin with; give it where two of these watch different places.

    Raises:
        ValueError: If an argument is out of its range, or at setup with a sharded trunk (FSDP2), whose gradients
            cannot be had beside the update.
        ModuleNotFoundError: If matplotlib is missing with ``figure=True``.

    Source: Yu et al., Gradient Surgery for Multi-Task Learning, 2020, arXiv:2001.06782: its definitions 1 and 2; the
    curvature of definition 3 would need the parameters of a second point.

    Deviations: a task's gradient of zero has no angle; its pairs are left out.

    Example:
        >>> conflict = GradientConflict(every_n_steps=10, at="features", figure=False)
        >>> conflict.at, conflict.measures_in(20), conflict.measures_in(25)
        ('features', True, False)
    """

    title: ClassVar[str] = "cosines of gradients"
    limits: tuple[float, float] | None = (-1.0, 1.0)

    def __init__(
        self,
        every_n_steps: int = 50,
        at: str | Sequence[str] = "trunk",
        *,
        figure: bool = True,
        name: str = "conflict",
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, at=at, figure=figure, name=name)

    @property
    def cosines(self) -> Tensor:
        """Return the mean cosines over the training, ``[K, K]``, tasks in the module's order."""
        return self.whole.mean()

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        """Log this step's measures and count its cosines."""
        if signals.gramian is None or signals.num_tasks < 2:
            return
        self.write(pl_module, {k: v for k, v in conflict_measures(signals.gramian).items() if v.isfinite()})
        self.count(cosines(signals.gramian), signals.tasks)
        if len(self.main) < len(self.tasks):
            main = torch.tensor([task in self.main for task in signals.tasks], dtype=signals.gramian.dtype)
            products = signals.gramian @ main
            # Not a number where one of the two is zero: nothing is known then.
            self.note_help(
                pl_module, products / signals.gramian.diagonal().sqrt() / (main @ products).sqrt(), signals.tasks
            )
