"""Numbers travel between the host and a device here, with as few waits for the device as they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WITHOUT_FLOAT64 = {"mps"}
"""The kinds of device that have no float64. A step converts to float64 on the host there."""


def widest(device: torch.device) -> torch.dtype:
    """The widest dtype that a device has: float64, or float32.

    Example:
        >>> widest(torch.device("cpu")), widest(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def send(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a few numbers to a device; the host goes on at once, while the device is busy with earlier work.

    Args:
        values: On the host, or on a device already.
        device: Where they are needed.
        dtype: What they become; None keeps theirs.
    """
    if not values.is_cpu or device.type == "cpu":
        # From a device with float32 alone to the host, a conversion on the way would happen on the device.
        return (values.cpu() if device.type == "cpu" else values.to(device)).to(dtype or values.dtype)
    values = values.to(dtype or values.dtype)
    if device.type == "cuda":
        values = values.pin_memory()  # CUDA copies from other memory only once earlier work is done
    # MPS reads the host's memory when it comes to the copy, and by then the memory may hold something else.
    return values.to(device, non_blocking=device.type != "mps")


def numbers(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Make a tensor of numbers that the host knows, such as positions, as :func:`send` copies it.

    Example:
        >>> numbers([2, 0], torch.device("cpu"))
        tensor([2, 0])
    """
    return send(torch.tensor(values, dtype=dtype), device)


def finish_queue(device: torch.device) -> None:
    """Wait until a device has done what is queued; the CPU has no queue."""
    accelerator = torch.accelerator.current_accelerator() if device.type != "cpu" else None
    if accelerator is not None and accelerator.type == device.type:
        torch.accelerator.synchronize(device)


def fetch(*values: Tensor) -> list[Tensor]:
    """Copy a few numbers to the host, with one wait for those of one device.

    Args:
        values: Real tensors of any shape; those of the host are returned as they are.

    Example:
        >>> fetch(torch.tensor([1.0, 2.0]), torch.tensor(3.0))
        [tensor([1., 2.]), tensor(3.)]
    """
    found = list(values)
    away: dict[torch.device, list[int]] = {}
    for position, value in enumerate(values):
        if not value.is_cpu:
            away.setdefault(value.device, []).append(position)
    for positions in away.values():
        dtype = values[positions[0]].dtype
        for position in positions[1:]:
            dtype = torch.promote_types(dtype, values[position].dtype)
        whole = torch.cat([values[position].detach().reshape(-1).to(dtype) for position in positions]).cpu()
        parts = whole.split([values[position].numel() for position in positions])
        for position, part in zip(positions, parts, strict=True):
            found[position] = part.view(values[position].shape).to(values[position].dtype)
    return found
