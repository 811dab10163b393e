"""A second pass leaves no trace: buffers and random numbers are what they were before it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.losses import reduce_losses
from lightning_mtl.training.window import Window


class Snapshot:
    """Keeps copies of a module's buffers and of the random states of Python, NumPy, torch and the module's device.

    Args:
        module: What will run, and must not have.
        device: Where it runs.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> before = Snapshot(norm, torch.device("cpu"))
        >>> _ = norm(torch.randn(4, 2))
        >>> before.put_back()
        >>> norm.num_batches_tracked
        tensor(0)
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._buffers = [
            (owner, name, buffer, buffer.clone())
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False)
        ]
        self._device = device
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state others draw from
        self._torch = torch.get_rng_state()
        self._on_device = None if device.type == "cpu" else _generators(device).get_rng_state()

    def put_back(self) -> None:
        """Make everything what it was."""
        for owner, name, buffer, value in self._buffers:
            if getattr(owner, name) is not buffer:
                setattr(owner, name, buffer)
            # Autograd counts changes of what it has saved; values that return to what they were are none.
            buffer.data.copy_(value)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._on_device is not None:
            _generators(self._device).set_rng_state(self._on_device)


def _generators(device: torch.device) -> Any:  # noqa: ANN401 - a module of torch's
    return torch.get_device_module(device)


@torch.no_grad()
def losses_after(module: TaskModule, window: Window, names: Sequence[str]) -> Tensor:
    """Compute the window's mean losses again, under the parameters as they are now, and leave no trace of it.

    Buffers and random numbers are put back, and no metric is updated.
    """
    again = Window(tuple(module.tasks), None, window.step, window.epoch, window.size, window.ranks)
    before = Snapshot(module, module.device)
    try:
        for batch in window.batches:
            outputs = module.present_outputs(batch)
            with torch.autocast(module.device.type, enabled=False):
                again.note(reduce_losses(outputs, again.tasks, again.ranks, module.device), {})
    finally:
        before.put_back()
    return again.mean_losses(names)
