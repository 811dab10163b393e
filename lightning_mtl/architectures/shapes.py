"""What trunks check in the shapes they meet, so that an error names the part that does not fit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def check_tasks(tasks: Sequence[str], who: str) -> tuple[str, ...]:
    """Check the tasks that a trunk has parts for.

    Raises:
        ValueError: If there is none, or one comes twice.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"{who}(tasks={tasks!r}) must be a sequence of one task or more.")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"{who}(tasks={list(tasks)}) names a task twice.")
    return tuple(tasks)


def call(module: nn.Module, x: Tensor, who: str) -> Tensor:
    """Call a module, and say which one it was if it cannot take its input.

    Raises:
        ValueError: If the module raises one of torch's errors.
    """
    if torch.compiler.is_compiling():
        return module(x)  # type: ignore[no-any-return]  # modules return anything
    try:
        return module(x)  # type: ignore[no-any-return]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(f"{who} failed on an input of shape {list(x.shape)}: {error}") from error
