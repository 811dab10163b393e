"""Heads that write into the features, where plain PyTorch allows it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.gradients.situations.base import WIDTH, Loss, Net, Part, Situation, classification, deep, regression


def relu_first(outputs: int) -> Part:
    """Begins with an activation in place."""
    return lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, outputs))


class AddFirst(nn.Module):
    """Begins with an addition in place, which may follow other writes and readers."""

    def __init__(self, outputs: int, *, own: bool = True) -> None:
        super().__init__()
        self.shift, self.layer = nn.Parameter(torch.rand(WIDTH)), nn.Linear(WIDTH, outputs)
        self.own = own

    def forward(self, z: Tensor) -> Tensor:
        z.add_(self.shift if self.own else 1.0)
        # A product with a copy: the layer then keeps the copy, and later writes into z do no harm.
        result: Tensor = self.layer(z * 2)
        return result


def add_first(outputs: int, *, own: bool = True) -> Part:
    return lambda: AddFirst(outputs, own=own)


class Beside(nn.Module):
    """Reads a copy, so that whoever writes into the features does no harm."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, outputs)

    def forward(self, z: Tensor) -> Tensor:
        result: Tensor = self.layer(z * 2)
        return result


def beside(outputs: int) -> Part:
    return lambda: Beside(outputs)


class ThroughSelf(Net):
    """Predicts by the module's own forward."""

    def losses(self, x: Tensor) -> Loss:
        found = self(x)
        return {"a": regression(found["a"], x), "b": classification(found["b"], x)}


class WrittenBetween(Net):
    """The loop that calls the heads writes between them."""

    write: Callable[[Tensor], object] = staticmethod(lambda z: z.mul_(2))

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        a = self.heads["a"](z)
        self.write(z)
        return {"a": regression(a, x), "b": classification(self.heads["b"](z), x)}


class RowWritten(WrittenBetween):
    """A row of the features is set to zero, through a view."""

    write = staticmethod(lambda z: z[0].zero_())


class MaskWritten(WrittenBetween):
    write = staticmethod(lambda z: z.masked_fill_(z < 0, 0.5))


class WrittenLast(Net):
    """The features are written when both heads have read them, and a loss reads them once more."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        a, b = self.heads["a"](z), self.heads["b"](z)
        z.add_(1.0)
        return {"a": regression(a, x) + z.pow(2).mean(), "b": classification(b, x)}


class Overwritten(nn.Module):
    """A trunk that writes in place itself, up to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.layer(x)
        z.relu_()
        return z.clone().add_(self.shift)


def in_place(net: type[Net], a: Part, b: Part) -> functools.partial[Net]:
    return functools.partial(net, trunk=deep, a=a, b=b)


IN_PLACE = (
    Situation("first head relu_", in_place(Net, relu_first(1), beside(3)), layer="trunk.2"),
    Situation("last head relu_", in_place(Net, beside(1), relu_first(3)), layer="trunk.2"),
    Situation("last head relu_, in forward", in_place(ThroughSelf, beside(1), relu_first(3)), layer="trunk.2"),
    Situation("both heads add_", in_place(Net, add_first(1), add_first(3)), layer="trunk.2"),
    Situation("both heads add_, in forward", in_place(ThroughSelf, add_first(1), add_first(3)), layer="trunk.2"),
    Situation(
        "both heads add_ a number", in_place(Net, add_first(1, own=False), add_first(3, own=False)), layer="trunk.2"
    ),
    Situation("first add_, then relu_", in_place(Net, add_first(1), relu_first(3)), layer="trunk.2"),
    Situation("features written between the heads", in_place(WrittenBetween, beside(1), beside(3)), layer="trunk.2"),
    Situation("row written between the heads", in_place(RowWritten, beside(1), beside(3)), layer="trunk.2"),
    Situation("mask written between the heads", in_place(MaskWritten, beside(1), beside(3)), layer="trunk.2"),
    Situation("features written at the end", in_place(WrittenLast, beside(1), beside(3)), layer="trunk.2"),
    Situation("trunk writes in place", functools.partial(Net, trunk=Overwritten), layer="trunk.layer", clean=True),
)
