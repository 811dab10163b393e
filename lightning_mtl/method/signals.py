"""Signals are what one optimizer step has measured; a decision is what a weighting makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_mtl.devices import numbers


@dataclass(frozen=True)
class Signals:
    """The measurements of one step: detached, float32 or wider, the same on every rank.

    K is the number of tasks present in the step, in the module's task order.

    Attributes:
        tasks: The K present tasks.
        losses: ``[K]``, the task losses L_k.
        step: Optimizer steps taken before this one.
        epoch: The epoch, from 0.
        norms: ``[K]``, ‖g_k‖, for methods that measure ``"norms"`` or more.
        gramian: ``[K, K]``, the inner products g_i · g_j, float64 on the CPU, for methods that measure ``"gramian"``.
        scores: ``[K]``, this batch's value of the metric that a method asked for through ``step_metric``.
        traces: ``[K]``, the mean diagonal entry of each task's neural tangent kernel, for methods with
            ``kernel_probes``.
        losses_after: ``[K]``, the same samples' losses under the parameters that the step led to, in the ``update`` of
            methods that asked for them through ``wants_losses_after``.
        losses_ahead: ``[K, K]``, L_j after a trial step along task i's gradient alone, in row i, for monitors
            that ``looks_ahead``.
        host_losses: ``[K]``, the losses on the CPU, where the step has read them: in ``update``, and for monitors.
        host_norms: ``[K]``, the norms on the CPU, likewise.

    Example:
        >>> import torch
        >>> Signals(tasks=("a", "b"), losses=torch.tensor([1.0, 2.0]), step=0, epoch=0).num_tasks
        2
    """

    tasks: tuple[str, ...]
    losses: Tensor
    step: int
    epoch: int
    norms: Tensor | None = None
    gramian: Tensor | None = None
    scores: Tensor | None = None
    traces: Tensor | None = None
    losses_after: Tensor | None = None
    losses_ahead: Tensor | None = None
    host_losses: Tensor | None = None
    host_norms: Tensor | None = None

    @property
    def num_tasks(self) -> int:
        """K, the number of present tasks."""
        return len(self.tasks)

    def losses_on_cpu(self) -> Tensor:
        """Return the losses on the CPU; the host waits for a device only where the step has not read them before."""
        return self.losses.cpu() if self.host_losses is None else self.host_losses.to(self.losses.dtype)

    def cut(self, positions: Sequence[int]) -> Signals:
        """Return the measurements of some of the tasks alone.

        Args:
            positions: Where these stand among :attr:`tasks`.

        Example:
            >>> import torch
            >>> Signals(("a", "b"), torch.tensor([1.0, 2.0]), step=0, epoch=0).cut([1]).losses
            tensor([2.])
        """
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in found.items():
            if isinstance(value, Tensor):
                chosen = numbers(positions, value.device, torch.long)
                found[name] = value[chosen] if value.ndim == 1 else value[chosen][:, chosen]
        return Signals(**found | {"tasks": tuple(self.tasks[position] for position in positions)})


@dataclass
class Decision:
    """What a weighting made of the measurements.

    Attributes:
        weights: ``[K]``, what multiplies each task's shared gradient.
        head_weights: ``[K]``, what multiplies the gradients of each task's own parameters; None for ``weights``.
        directions: The shared gradient itself, ``[n]`` for each matrix of rows, where no weights describe it.
    """

    weights: Tensor
    head_weights: Tensor | None = None
    directions: Sequence[Tensor] | None = None


def cosines(gramian: Tensor) -> Tensor:
    r"""Compute the cosine of the angle between each two gradients.

    .. math:: \cos\phi_{ij} = \frac{g_i \cdot g_j}{\lVert g_i \rVert \lVert g_j \rVert}

    Args:
        gramian: ``[K, K]``, the inner products.

    Returns:
        ``[K, K]``, not a number where a gradient is zero.

    Example:
        >>> import torch
        >>> cosines(torch.tensor([[4.0, -3.0], [-3.0, 9.0]]))
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.0000]])
    """
    norms = gramian.diagonal().sqrt()
    # One after the other: the product of two tiny norms may be no number any more.
    return (gramian / norms[:, None] / norms).clamp(-1, 1)
