"""Counts where the host waits for a device; and refuses float64 there, as MPS does."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_mtl
from tests.devices.build import NAME

ROOT = f"{Path(lightning_mtl.__file__).parent}/"
# The size of what comes out depends on the numbers, which the host has to know.
SIZED_BY_NUMBERS = {"aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_dim", "aten.equal"}
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _away(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def waits(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operation makes the host wait for all that a device has queued."""
    given = _tensors(args, kwargs)
    if name == "aten._local_scalar_dense" or name in SIZED_BY_NUMBERS:
        return any(map(_away, given))
    if name == "aten.lift_fresh":  # torch.tensor(numbers, device=...): a copy from memory that is not pinned
        return _away(given[0])
    if name == "aten._to_copy":
        to = torch.device(kwargs.get("device") or given[0].device)
        return to.type != given[0].device.type and not (to.type == NAME and kwargs.get("non_blocking"))
    if name == "aten.copy_":
        goes = len(args) > 2 and args[2] and _away(given[0])
        return given[0].device.type != given[1].device.type and not (goes or kwargs.get("non_blocking"))
    if name in INDEXING and _away(given[0]):
        # Positions from the host, a list for instance, are copied; a mask is counted first.
        places = _tensors(args[1])
        return any(not _away(place) or place.dtype == torch.bool for place in places)
    return False


def place() -> str:
    """The package's line that a call came from, else the innermost one of Lightning or torch."""
    frame: FrameType | None = sys._getframe(2)
    other = "?"
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(ROOT) and not name.endswith("devices.py"):
            return f"{name.removeprefix(ROOT)}:{frame.f_lineno}"
        if other == "?" and "/torch/utils/_python_dispatch" not in name and not name.endswith(__name__):
            other = f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return other


class Waits(TorchDispatchMode):
    """Counts waits by the line that they came from, while it is counting."""

    def __init__(self, *, counting: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counting, self.found = counting, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rsplit(".", 1)[0]
        if self.counting and waits(name, args, kwargs or {}):
            self.found[f"{name} {place()}"] += 1
        return func(*args, **(kwargs or {}))


class CountIn(pl.Callback):
    """Lets a mode count in some batches alone; the first of the callbacks, so that all others' hooks are counted."""

    def __init__(self, mode: Waits, batches: Sequence[int]) -> None:
        self.mode, self.batches = mode, batches

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.mode.counting = index in self.batches

    def on_train_batch_end(self, *_: Any) -> None:
        self.mode.counting = False


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the device, a conversion to it on the way to the host, and what MPS does not compute."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = str(func).rsplit(".", 1)[0], _tensors(args, kwargs or {})
        wanted = (kwargs or {}).get("dtype") if name == "aten._to_copy" else None
        if any(map(_away, given)):
            if name.startswith("aten._linalg_eigh"):
                raise TypeError(f"{name} on a device that has none, from {place()}")
            if name == "aten.copy_" and given[0].dtype == torch.float64 != given[1].dtype and _away(given[1]):
                wanted = torch.float64
        found = func(*args, **(kwargs or {}))
        wide = any(_away(tensor) and tensor.dtype == torch.float64 for tensor in _tensors(found))
        if wide or (wanted == torch.float64 and given and _away(given[0])):
            raise TypeError(f"{name} makes float64 on a device that has none, from {place()}")
        return found
