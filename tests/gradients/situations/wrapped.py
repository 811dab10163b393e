"""Layers that PyTorch wraps: parametrizations, activation checkpoints, compilation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.gradients.situations.base import (
    WIDTH,
    Loss,
    Net,
    Situation,
    classification,
    deep,
    linear,
    regression,
)


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))


def spectrally_normed() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)))


def orthogonal() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)))


class Checkpointed(nn.Module):
    """Recomputes its activations in the backward pass."""

    def __init__(self, outputs: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.rest = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, outputs))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.rest, self.first(x), use_reentrant=False)
        return result


class CheckpointedDropout(Checkpointed):
    """The recomputation draws the same random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rest.insert(1, nn.Dropout(0.5))


class CheckpointedCall(Net):
    """The whole trunk is called inside a checkpoint."""

    def losses(self, x: Tensor) -> Loss:
        z = checkpoint(self.trunk, x, use_reentrant=False)
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class CheckpointedAll(Net):
    """Trunk and head are called inside one checkpoint."""

    def losses(self, x: Tensor) -> Loss:
        a = checkpoint(lambda rows: self.heads["a"](self.trunk(rows)), x, use_reentrant=False)
        return {"a": regression(a, x), "b": classification(self.heads["b"](self.trunk(x)), x)}


class CheckpointedCalls(Net):
    """A checkpointed head that reads the trunk's output twice."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)

        def predict(features: Tensor) -> Tensor:
            result: Tensor = self.heads["a"](features) + self.heads["a"](features.tanh())
            return result

        a = checkpoint(predict, z, use_reentrant=False)
        return {"a": regression(a, x), "b": classification(self.heads["b"](z), x)}


def compiled(module: nn.Module) -> nn.Module:
    result: Any = torch.compile(module, backend="aot_eager")
    assert isinstance(result, nn.Module)
    return result


@functools.cache
def _compiled_parts(kind: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The parts of one model, compiled once for all tests: their parameters stay as they are at step size 0."""
    trunk, a, b = deep(), deep(1), linear(3)()
    if kind == "in place":
        trunk.compile(backend="aot_eager")
    elif kind == "trunk":
        trunk = compiled(trunk)
    else:
        a, b = compiled(a), compiled(b)
    return trunk.double(), a.double(), b.double()


def with_compiled(kind: str, **arguments: Any) -> Net:
    trunk, a, b = _compiled_parts(kind)
    for part in (trunk, a, b):
        part.zero_grad()
    return Net(trunk=lambda: trunk, a=lambda: a, b=lambda: b, **arguments)


class CompiledLosses(Net):
    """Trunk and heads are compiled as one function."""

    def losses(self, x: Tensor) -> Loss:
        def predict(trunk: nn.Module, a: nn.Module, b: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
            z = trunk(rows)
            return a(z), b(z)

        run = torch.compile(predict, backend="aot_eager")
        a, b = run(self.trunk, self.heads["a"], self.heads["b"], x)
        return {"a": regression(a, x), "b": classification(b, x)}


WRAPPED = (
    Situation("weight_norm", functools.partial(Net, trunk=weight_normed), layer="trunk.2", is_last=False, clean=True),
    Situation(
        "spectral_norm", functools.partial(Net, trunk=spectrally_normed), layer="trunk.2", is_last=False, clean=True
    ),
    Situation("orthogonal", functools.partial(Net, trunk=orthogonal), layer="trunk.2", is_last=False, clean=True),
    Situation("checkpointed trunk", functools.partial(Net, trunk=Checkpointed), layer="trunk.rest.3", clean=True),
    Situation(
        "checkpointed trunk and head",
        functools.partial(Net, trunk=Checkpointed, a=functools.partial(Checkpointed, 1)),
        layer="trunk.rest.3",
        clean=True,
    ),
    Situation(
        "checkpointed dropout", functools.partial(Net, trunk=CheckpointedDropout), layer="trunk.rest.4", clean=True
    ),
    Situation("trunk called in a checkpoint", CheckpointedCall),
    Situation("trunk and head called in a checkpoint", CheckpointedAll),
    Situation("checkpointed calls of a head", CheckpointedCalls, clean=True),
    Situation("compiled trunk", functools.partial(with_compiled, "trunk"), layer="trunk._orig_mod.2", clean=True),
    Situation("trunk compiled in place", functools.partial(with_compiled, "in place"), layer="trunk.2", clean=True),
    Situation("compiled heads", functools.partial(with_compiled, "heads"), layer="trunk.2", clean=True),
    # The compiler traces through the call of the trunk: nothing of it is left to see.
    Situation("trunk and heads compiled as one", CompiledLosses, is_last=False, refused={"features": "call|compil"}),
)
