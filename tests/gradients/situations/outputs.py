"""What trunks return, and ways to call them: opaque objects, dataclasses, nested tensors, scripts, parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.gradients.situations.base import WIDTH, Loss, Net, Situation, classification, deep, regression


class Opaque:
    """A plain object."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high


@dataclass(frozen=True)
class Frozen:
    low: Tensor
    high: Tensor


@dataclass(frozen=True, slots=True)
class Slotted:
    low: Tensor
    high: Tensor


@dataclass
class Open:
    low: Tensor
    high: Tensor
    note: str = "not a tensor"


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


class PartlyOpaque(NamedTuple):
    """Holds one tensor openly and one in a plain object."""

    high: Tensor
    rest: Opaque

    @property
    def low(self) -> Tensor:
        return self.rest.low


class ReadOnly(Mapping[str, Tensor]):
    """A mapping that is no dict."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self._held = {"low": low, "high": high}

    def __getitem__(self, key: str) -> Tensor:
        return self._held[key]

    def __iter__(self) -> Any:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    low = property(lambda self: self["low"])
    high = property(lambda self: self["high"])


class Wrapping(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.wrap = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), wrap

    def forward(self, x: Tensor) -> Any:
        low = self.first(x).tanh()
        return self.wrap(low, self.second(low).tanh())


class Reading(Net):
    """Task a reads both tensors, task b the upper one."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {
            "a": regression(self.heads["a"](z.low + z.high), x),
            "b": classification(self.heads["b"](z.high), x),
        }


class ReadingOneOnly(Net):
    """One tensor counts alone."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {"a": regression(self.heads["a"](z.high), x), "b": classification(self.heads["b"](z.high), x)}


class Ragged(nn.Module):
    """Returns sequences of different lengths as one nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x).tanh()
        return torch.nested.as_nested_tensor([z[:2], z[2:]], layout=torch.jagged)


class RaggedReading(Net):
    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {
            "a": regression(self.heads["a"](z.values()), x),
            "b": classification(self.heads["b"](z.values()), x),
        }


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def scripted() -> nn.Module:
    module: nn.Module = torch.jit.script(Scripted())
    return module


def partly_scripted() -> nn.Module:
    """An ordinary trunk that holds a script."""
    return nn.Sequential(scripted(), nn.Linear(WIDTH, WIDTH))


class ByForward(Net):
    """Calls the trunk's forward, past its hooks."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk.forward(x)
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class ByForwardToo(Net):
    """Calls the trunk, and its forward."""

    def losses(self, x: Tensor) -> Loss:
        z, other = self.trunk(x), self.trunk.forward(x.flip(0))
        return {"a": regression(self.heads["a"](z + other), x), "b": classification(self.heads["b"](z), x)}


class PartAlone(Net):
    """Calls a part of the trunk, never the whole."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk.get_submodule("0")(x)
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z.tanh()), x)}


class PartToo(Net):
    """Task a reads a part of the trunk, called directly, task b the whole."""

    def losses(self, x: Tensor) -> Loss:
        return {
            "a": regression(self.heads["a"](self.trunk.get_submodule("0")(x)), x),
            "b": classification(self.heads["b"](self.trunk(x)), x),
        }


class ByPieces(Net):
    """Calls the trunk layer by layer."""

    def losses(self, x: Tensor) -> Loss:
        z = x
        for layer in self.trunk.children():
            z = layer(z)
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class ReturnsParameter(nn.Module):
    """Returns one of its parameters beside the features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Pair:
        return Pair(self.scale, self.layer(x).tanh())


class PassesInputs(nn.Module):
    """Returns its inputs beside the features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Pair:
        return Pair(x, self.layer(x).tanh())


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x).tanh().expand(-1, WIDTH)
        return result


class Recurrent(nn.Module):
    """Returns a sequence and a state, as torch.nn.GRU does."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(1, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Pair:
        sequence, state = self.cells(x[:, :, None])
        return Pair(state[0], sequence.mean(1))


def returning(wrap: Callable[[Tensor, Tensor], Any], net: type[Net] = Reading) -> Any:
    return functools.partial(net, trunk=functools.partial(Wrapping, wrap))


# Nothing shows a library which tensors are the features.
HIDDEN = {"features": "features|output"}
OUTPUTS = (
    Situation("opaque object", returning(Opaque), layer="trunk.second", refused=HIDDEN),
    Situation(
        "opaque object, one tensor read", returning(Opaque, ReadingOneOnly), layer="trunk.second", refused=HIDDEN
    ),
    Situation("partly opaque", returning(lambda a, b: PartlyOpaque(b, Opaque(a, b))), layer="trunk.second"),
    Situation("frozen dataclass", returning(Frozen), layer="trunk.second"),
    Situation("frozen dataclass with slots", returning(Slotted), layer="trunk.second", refused=HIDDEN),
    Situation("dataclass", returning(Open), layer="trunk.second"),
    Situation("named tuple", returning(Pair), layer="trunk.second"),
    Situation("mapping that is no dict", returning(ReadOnly), layer="trunk.second", refused=HIDDEN),
    Situation(
        "jagged tensor",
        functools.partial(RaggedReading, trunk=Ragged),
        layer="trunk.layer",
        refused={"features": "nested|jagged"},
    ),
    # A script takes no hooks and does not show its order of execution.
    Situation(
        "script",
        functools.partial(Net, trunk=scripted),
        layer="trunk.layer",
        refused={"features": "script|hook", "last_layer": "script|hook"},
    ),
    Situation("script inside the trunk", functools.partial(Net, trunk=partly_scripted), layer="trunk.1", clean=True),
    Situation("trunk.forward called", ByForward, refused=HIDDEN | {"features": "call"}),
    Situation("trunk and trunk.forward called", ByForwardToo),
    Situation("part of the trunk called, never the whole", PartAlone, refused={"features": "call"}),
    Situation("part of the trunk called, and the whole", PartToo),
    Situation(
        "trunk called layer by layer",
        functools.partial(ByPieces, trunk=deep),
        layer="trunk.2",
        refused={"features": "call"},
    ),
    Situation("trunk returns a parameter", functools.partial(Reading, trunk=ReturnsParameter), layer="trunk.layer"),
    Situation(
        "trunk returns its inputs", functools.partial(Reading, trunk=PassesInputs), layer="trunk.layer", clean=True
    ),
    Situation(
        "trunk returns an expanded tensor", functools.partial(Net, trunk=Expanded), layer="trunk.layer", clean=True
    ),
    Situation("recurrent cells", functools.partial(Reading, trunk=Recurrent), layer="trunk.cells"),
)
