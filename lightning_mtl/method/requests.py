"""Requests are what a method may ask of a step beside losses and whole measurements of all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Requests:
    """The part of a weighting that says what else it needs; the training step reads it."""

    step_metric: str | None = None
    """The metric whose value on each training batch :attr:`Signals.scores` must hold."""
    wants_losses_after: bool = False
    """Whether :meth:`update` needs :attr:`Signals.losses_after`, for which the window's batches are passed again."""
    kernel_probes: int = 0
    """How many random probes of each task's neural tangent kernel :attr:`Signals.traces` is estimated by; each is a
    backward pass from the task's residuals. 0 asks for no traces."""
    renews_rows: bool = False
    """Whether the method keeps the tasks' gradients, and is given those of :meth:`to_renew` in each step that it looks
    at, as the rows of :meth:`decide`; all of them under accumulation, where they are kept anyway."""

    def to_renew(self, tasks: Sequence[str], size: int) -> list[int]:
        """Say whose gradients to measure in this step, for methods that :attr:`renews_rows`.

        Args:
            tasks: The present tasks.
            size: How many real numbers a gradient of the shared parameters is.

        Returns:
            Positions among the present tasks, ascending.
        """
        del size
        return list(range(len(tasks)))

    def probes(self, device: torch.device) -> torch.Generator:
        """The random numbers of this step's probes, for methods with :attr:`kernel_probes`."""
        return torch.Generator(device)
