"""Models that call the trunk more than once: on its own output, from a head, on other inputs; or return levels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class Repeated(Net):
    """The trunk on its own output, several times."""

    times, skip = 2, False

    def losses(self, x: Tensor) -> Loss:
        z = x
        for _ in range(self.times):
            z = z + self.trunk(z) if self.skip else self.trunk(z)
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class Repeated3(Repeated):
    times = 3


class Repeated2Skip(Repeated):
    skip = True


class Repeated3Skip(Repeated):
    times, skip = 3, True


class ThroughForward(Net):
    """The same, by the module's own forward."""

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        z = self.trunk(self.trunk(self.trunk(inputs)))
        return {task: head(z) for task, head in self.heads.items()}

    def losses(self, x: Tensor) -> Loss:
        found = self(x)
        return {"a": regression(found["a"], x), "b": classification(found["b"], x)}


class EarlyExit(Net):
    """Task a reads the first of two nested calls, task b the second."""

    def losses(self, x: Tensor) -> Loss:
        first = self.trunk(x)
        return {
            "a": regression(self.heads["a"](first), x),
            "b": classification(self.heads["b"](self.trunk(first)), x),
        }


class Recycled(Net):
    """The second call reads the first one's output without its gradient."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(self.trunk(x).detach())
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class Mixed(Net):
    """The second call reads a mixture of inputs and features."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {
            "a": regression(self.heads["a"](self.trunk(0.5 * x + 0.5 * z)), x),
            "b": classification(self.heads["b"](z), x),
        }


class HeadCallsTrunk(Net):
    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {
            "a": regression(self.heads["a"](self.trunk(z)), x),
            "b": classification(self.heads["b"](z), x),
        }


class Cycle(Net):
    """What task a reconstructs goes through the trunk again and must give the same features."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        again = self.heads["a"](z)
        return {
            "a": F.mse_loss(again, x) + F.mse_loss(self.trunk(again), z),
            "b": classification(self.heads["b"](z), x),
        }


class Siamese(Net):
    """Two calls on inputs of their own; one task compares the two outputs."""

    def losses(self, x: Tensor) -> Loss:
        z, other = self.trunk(x), self.trunk(x.flip(0))
        return {
            "a": regression(self.heads["a"](z - other), x),
            "b": classification(self.heads["b"](other), x),
        }


class TwoInputs(Net):
    """Each task has inputs of its own."""

    def losses(self, x: Tensor) -> Loss:
        return {
            "a": regression(self.heads["a"](self.trunk(x)), x),
            "b": classification(self.heads["b"](self.trunk(2 * x[:3])), x[:3]),
        }


class Loop(Net):
    """A recurrence: as many calls as there are samples, each on the sum of the one before and a new input."""

    def losses(self, x: Tensor) -> Loss:
        state, states = torch.zeros_like(x[:1]), []
        for row in x.split(1):
            state = self.trunk(state + row)
            states.append(state)
        z = torch.cat(states)
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](state), x[-1:])}


class Levels(nn.Module):
    """Returns a low level and a high one that is computed from it."""

    def __init__(self, *, separate: bool = False) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.separate = separate

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(x).tanh()
        return {"low": low, "high": self.high(x if self.separate else low).tanh()}


class ByLevels(Net):
    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {
            "a": regression(self.heads["a"](z["low"] + z["high"]), x),
            "b": classification(self.heads["b"](z["high"]), x),
        }


class ReadApart(Net):
    """Task a reads the low level alone, task b the high one alone."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {
            "a": regression(self.heads["a"](z["low"]), x),
            "b": classification(self.heads["b"](z["high"]), x),
        }


class SameTensorTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.layer(x).tanh()
        return {"low": z, "high": z}


class Halves(nn.Module):
    """Returns two views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low, high = self.layer(x).tanh().chunk(2, 1)
        return {"low": low, "high": high}


NESTED = (
    Situation("trunk applied twice", Repeated),
    Situation("trunk applied three times", Repeated3),
    Situation("trunk applied twice, with skip", Repeated2Skip),
    Situation("trunk applied three times, with skip", Repeated3Skip),
    Situation("trunk applied three times, deep", functools.partial(Repeated3, trunk=deep), layer="trunk.2"),
    Situation("trunk applied three times in forward", ThroughForward),
    Situation("tasks read different depths", EarlyExit),
    Situation("trunk applied to detached features", Recycled),
    Situation("trunk applied to a mixture of inputs and features", Mixed),
    Situation("head calls the trunk", HeadCallsTrunk),
    Situation("cycle consistency", functools.partial(Cycle, a=linear(WIDTH))),
    Situation("siamese", Siamese),
    Situation("two calls, inputs of each task's own", TwoInputs),
    Situation("recurrent trunk", Loop),
    Situation("levels, one computed from the other", functools.partial(ByLevels, trunk=Levels), layer="trunk.high"),
    Situation(
        "levels, each read by one task", functools.partial(ReadApart, trunk=Levels), layer="trunk.low", is_last=False
    ),
    Situation(
        "levels that are independent",
        functools.partial(ByLevels, trunk=functools.partial(Levels, separate=True)),
        layer="trunk.high",
        clean=True,
    ),
    Situation("one tensor returned twice", functools.partial(ByLevels, trunk=SameTensorTwice), layer="trunk.layer"),
    Situation("two views of one tensor", functools.partial(ByLevels, trunk=Halves), layer="trunk.layer"),
)
