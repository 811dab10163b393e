"""Small trunks of every architecture, and modules and batches around them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.architectures import LTB, CrossStitch, SoftSharing

TASKS = ("a", "b")
WIDTH = 4


def stages() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, WIDTH))]


def soft_sharing(**arguments: Any) -> SoftSharing:
    settings: dict[str, Any] = {"strength": 0.1}
    return SoftSharing({task: nn.Sequential(*stages()) for task in TASKS}, **(settings | arguments))


def cross_stitch(**arguments: Any) -> CrossStitch:
    return CrossStitch({task: stages() for task in TASKS}, **arguments)


def ltb(**arguments: Any) -> LTB:
    """Three nodes in each of two stages; noise drawn."""
    first = [nn.Sequential(nn.Linear(3, 5), nn.Tanh()) for _ in range(3)]
    trunk = LTB([first, [nn.Linear(5, WIDTH) for _ in range(3)]], TASKS, **arguments)
    trunk.sample(step=0, temperature=2.0)
    return trunk


TRUNKS: dict[str, Callable[[], nn.Module]] = {
    "soft sharing": soft_sharing,
    "trace norm": functools.partial(soft_sharing, penalty="trace_norm"),
    "cross-stitch": cross_stitch,
    "cross-stitch, channels": functools.partial(cross_stitch, channels=[5, 5]),
    "learning to branch": ltb,
}


def module_of(trunk: nn.Module, **arguments: Any) -> MultiTaskModule:
    """Two regressions on top of a trunk, and plain descent."""
    settings: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}
    return MultiTaskModule(
        trunk,
        {task: nn.Linear(WIDTH, 1) for task in TASKS},
        {task: Task(mse_loss) for task in TASKS},
        **(settings | arguments),
    )


def build(name: str, seed: int = 0, **arguments: Any) -> MultiTaskModule:
    torch.manual_seed(seed)
    return module_of(TRUNKS[name](), **arguments)


def regression(number: int = 6, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, 3, generator=generator)
    return inputs, {task: torch.randn(number, 1, generator=generator) for task in TASKS}


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
