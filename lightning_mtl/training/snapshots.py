"""A second pass leaves no trace: buffers, attributes and random numbers are what they were before it."""

from __future__ import annotations

import collections
import random
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lightning_mtl.gradients.torch_internals import times_written
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.evaluation import second_look
from lightning_mtl.training.losses import reduce_losses
from lightning_mtl.training.window import Window

# What torch keeps in a module's dict for itself: parameters, buffers and hooks.
_OF_TORCH = frozenset(vars(nn.Module()))
_CONTAINERS = frozenset((list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict))
_PLAIN = frozenset((bool, int, float, str, type(None)))  # most attributes by far


class Snapshot:
    """Keeps copies of a module's state and of the random states of Python, NumPy, torch and the module's device.

    The state is what its parts have as buffers or as plain attributes: numbers, tensors, and what lists, dicts, sets
    and deques hold; and the tables of embeddings with a ``max_norm``, whose rows a pass shortens. What lies deeper,
    inside other objects, is not seen.

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
        tables = [part for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
        shortened = [part for part in tables if part.max_norm is not None]
        self._buffers += [(part, "weight", part.weight, part.weight.detach().clone()) for part in shortened]
        known = {part.weight for part in shortened}
        self._parameters = [(n, p, times_written(p)) for n, p in module.named_parameters() if p not in known]
        self._attributes = [_Attributes(part) for part in module.modules()]
        self._device = device
        # All generators that a forward pass may draw from: augmentations use Python's and NumPy's, dropout torch's.
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state others draw from
        self._torch = torch.get_rng_state()
        self._on_device = None if device.type == "cpu" else _generators(device).get_rng_state(*_which(device))

    def put_back(self) -> None:
        """Make everything what it was.

        Raises:
            ValueError: If a tensor that is no buffer was written into, a parameter for instance.
        """
        for owner, name, buffer, value in self._buffers:
            if getattr(owner, name) is not buffer:
                setattr(owner, name, buffer)
            # Autograd counts changes of what it has saved; values that return to what they were are none.
            buffer.data.copy_(value)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._on_device is not None:
            _generators(self._device).set_rng_state(self._on_device, *_which(self._device))
        for attributes in self._attributes:
            attributes.put_back()
        for name, parameter, times in self._parameters:
            if times_written(parameter) != times:
                raise _cannot_put_back("A forward pass", f"parameter {name!r}", "use FAMO(losses_after='next_batch')")


class _Attributes:
    """The plain attributes of one module: what they are bound to, and what the containers among them hold."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._bound = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
        self._containers = [(v, v.copy()) for v in self._bound.values() if type(v) in _CONTAINERS]
        # Not copied, for they may be as large as a data set.
        self._written = [
            (name, tensor, times_written(tensor))
            for name, value in self._bound.items()
            if type(value) not in _PLAIN
            for tensor in _tensors_in(value)
            if not tensor.is_inference()
        ]

    def put_back(self) -> None:
        attributes = vars(self._module)
        for name in [name for name in attributes if name not in _OF_TORCH and name not in self._bound]:
            del attributes[name]
        for name, value in self._bound.items():
            if name not in attributes or attributes[name] is not value:
                attributes[name] = value
        for container, content in self._containers:
            container.clear()
            container.update(content) if isinstance(container, dict | set) else container.extend(content)
        for name, tensor, times in self._written:
            if times_written(tensor) != times:
                raise _cannot_put_back(type(self._module).__name__, f"tensor {name!r}", "register it as a buffer")


def _cannot_put_back(who: str, what: str, fix: str) -> ValueError:
    return ValueError(
        f"{who} writes into the {what} in place, which a second pass, as FAMO and an exact TaskAffinity make it, "
        f"cannot take back; {fix}."
    )


def _tensors_in(value: object) -> Iterable[Tensor]:
    """A tensor, or those that a container holds."""
    if isinstance(value, Tensor):
        return [value]
    if type(value) not in _CONTAINERS:
        return []
    items = value.values() if isinstance(value, dict) else cast("Iterable[object]", value)
    return [item for item in items if isinstance(item, Tensor)]


def _generators(device: torch.device) -> Any:  # noqa: ANN401 - a module of torch's
    return torch.get_device_module(device)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """Which of several devices is meant, where torch can be told: the current one need not be the module's."""
    return () if device.type == "mps" else (device,)


@torch.no_grad()
def losses_after(module: TaskModule, window: Window, names: Sequence[str]) -> Tensor:
    """Compute the window's mean losses again, under the parameters as they are now, and leave no trace of it.

    The module's state and random numbers are put back, and no metric is updated.
    """
    again = Window(tuple(module.tasks), None, window.step, window.epoch, window.size, window.ranks)
    before = Snapshot(module, module.device)
    try:
        for batch in window.batches:
            with second_look(module):
                outputs = module.present_outputs(batch, window.resting.dropped)
            with torch.autocast(module.device.type, enabled=False):
                again.note(reduce_losses(outputs, again.tasks, again.ranks, module.device), {})
    finally:
        before.put_back()
    losses = again.mean_losses(names)
    return losses if window.scales is None else losses / window.scales.of(window.positions(names))
