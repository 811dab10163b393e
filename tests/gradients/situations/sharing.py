"""Parts that tasks share beside the trunk, or do not share at all: tied weights, decoders, cascades, probes."""

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
    linear,
    mlp,
    regression,
)


class Tied(Net):
    """Task a reconstructs with the trunk's own weight."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        weight = self.trunk.get_parameter("0.weight")
        return {
            "a": F.mse_loss(F.linear(self.heads["a"](z), weight.t()), x),
            "b": classification(self.heads["b"](z), x),
        }


class TiedBoth(Net):
    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        weight = self.trunk.get_parameter("0.weight")
        return {
            "a": F.mse_loss(F.linear(self.heads["a"](z), weight.t()), x),
            "b": classification(self.heads["b"](F.linear(z, weight)), x),
        }


class TiedParameter(Net):
    """A head's parameter is the trunk's parameter, as with tied embeddings."""

    def add_parts(self) -> None:
        self.heads["a"].weight = self.trunk.get_parameter("0.weight")

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {"a": F.mse_loss(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class Decoder(Net):
    """The heads read a decoder that is neither trunk nor head."""

    def add_parts(self) -> None:
        self.decoder = nn.Linear(WIDTH, WIDTH)

    def losses(self, x: Tensor) -> Loss:
        z = self.decoder(self.trunk(x)).tanh()
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class DecoderShared(Decoder):
    """The decoder is among the shared parameters."""

    def shared_parameters(self) -> list[nn.Parameter]:
        return [*super().shared_parameters(), *self.decoder.parameters()]


class Around(DecoderShared):
    """A shared layer before and behind the trunk."""

    def losses(self, x: Tensor) -> Loss:
        return {
            "a": regression(self.heads["a"](self.decoder(self.trunk(self.decoder(x)))), x),
            "b": classification(self.heads["b"](self.trunk(x)), x),
        }


class Before(Decoder):
    """A layer before the trunk that is no shared parameter: it takes the heads' weights."""

    def losses(self, x: Tensor) -> Loss:
        return super(Decoder, self).losses(self.decoder(x))


class BeforeAndInLoss(Before):
    def losses(self, x: Tensor) -> Loss:
        found = super().losses(x)
        return {"a": found["a"] * self.decoder.weight.sum(), "b": found["b"]}


class Narrow(Net):
    """Only the trunk's weight is shared; its bias counts as the heads do."""

    def shared_parameters(self) -> list[nn.Parameter]:
        return [self.trunk.get_parameter("0.weight")]


class HeadShared(Net):
    """The head of a is among the shared parameters, and the gradients of the tasks stay apart."""

    def shared_parameters(self) -> list[nn.Parameter]:
        return [*super().shared_parameters(), *self.heads["a"].parameters()]


def common_layer(**arguments: Any) -> Net:
    """The head of b is the first layer of the head of a."""
    layer = nn.Linear(WIDTH, 3)
    return Net(a=lambda: nn.Sequential(layer, nn.Linear(3, 1)), b=lambda: layer, **arguments)


class Cascade(Net):
    """The head of b reads the prediction of a."""

    detach = False

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        a = self.heads["a"](z)
        passed = a.detach() if self.detach else a
        return {"a": regression(a, x), "b": classification(self.heads["b"](torch.cat([z, passed], 1)), x)}


class CascadeDetached(Cascade):
    detach = True


class CascadeAlone(Net):
    """The head of b reads the prediction of a and nothing else."""

    def losses(self, x: Tensor) -> Loss:
        a = self.heads["a"](self.trunk(x))
        return {"a": regression(a, x), "b": classification(self.heads["b"](a), x)}


class Nested(Net):
    """One loss is part of the other."""

    def losses(self, x: Tensor) -> Loss:
        found = super().losses(x)
        return {"a": found["a"], "b": found["a"] + found["b"]}


class Twice(Net):
    """Both tasks have one and the same loss."""

    def losses(self, x: Tensor) -> Loss:
        loss = super().losses(x)["a"]
        return {"a": loss, "b": loss}


class Probe(Net):
    """Task b is a probe: it reads detached features, and its shared gradient is zero."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z.detach()), x)}


class ProbesAlone(Net):
    """Both tasks are probes."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x).detach()
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class OwnEncoder(Net):
    """Task b has an encoder of its own and does not use the trunk."""

    def add_parts(self) -> None:
        self.encoder = mlp()

    def losses(self, x: Tensor) -> Loss:
        return {
            "a": regression(self.heads["a"](self.trunk(x)), x),
            "b": classification(self.heads["b"](self.encoder(x)), x),
        }


class Constant(Net):
    """The loss of b is a number in this batch."""

    def losses(self, x: Tensor) -> Loss:
        return {"a": super().losses(x)["a"], "b": torch.tensor(0.5, dtype=torch.float64)}


class ConstantFirst(Net):
    def losses(self, x: Tensor) -> Loss:
        return {"a": torch.tensor(0.5, dtype=torch.float64), "b": super().losses(x)["b"]}


class Leaf(Net):
    """The loss of b is a fresh tensor that requires a gradient."""

    def losses(self, x: Tensor) -> Loss:
        return {"a": super().losses(x)["a"], "b": torch.tensor(0.5, dtype=torch.float64, requires_grad=True)}


class ParameterLoss(Net):
    """The loss of b is a parameter of the module itself."""

    def add_parts(self) -> None:
        self.scale = nn.Parameter(torch.tensor(0.5))

    def losses(self, x: Tensor) -> Loss:
        return {"a": super().losses(x)["a"] * self.scale, "b": self.scale}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = (self.layer(x) * self.scale).tanh()
        return result


class SharedParameterLoss(Net):
    """The loss of b is a parameter of the trunk."""

    def losses(self, x: Tensor) -> Loss:
        return {"a": super().losses(x)["a"], "b": self.trunk.get_parameter("scale")}


class WithoutHead(Net):
    """The loss of a is computed from the features alone."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {"a": z.pow(2).mean(), "b": classification(self.heads["b"](z), x)}


class ScalarTrunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x).pow(2).mean()
        return result


class OutputIsLoss(Net):
    """The trunk's output itself is the loss of a."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {"a": z, "b": classification(self.heads["b"](z.expand(len(x), WIDTH)), x)}


class LearnedLoss(Net):
    """A loss with a parameter of its own that scales both tasks."""

    def add_parts(self) -> None:
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def losses(self, x: Tensor) -> Loss:
        return {task: loss / self.temperature for task, loss in super().losses(x).items()}


SHARING = (
    Situation("tied weight in one head", functools.partial(Tied, a=linear(WIDTH))),
    Situation("tied weight in both heads", functools.partial(TiedBoth, a=linear(WIDTH))),
    Situation("tied parameter", functools.partial(TiedParameter, a=linear(WIDTH))),
    Situation("decoder", Decoder, clean=True),
    Situation("decoder among the shared parameters", DecoderShared),
    Situation("head among the shared parameters", HeadShared),
    Situation("shared layer before and behind the trunk", Around),
    Situation("layer before the trunk", Before, clean=True),
    Situation("layer before the trunk and in a loss", BeforeAndInLoss, clean=True),
    Situation("weight shared, bias not", Narrow, is_last=False, layer="trunk"),
    Situation("layer that both heads hold", common_layer, clean=True),
    Situation("cascade", functools.partial(Cascade, b=linear(3, WIDTH + 1)), clean=True),
    Situation("cascade, detached", functools.partial(CascadeDetached, b=linear(3, WIDTH + 1)), clean=True),
    Situation("cascade alone", functools.partial(CascadeAlone, b=linear(3, 1)), clean=True),
    Situation("loss within a loss", Nested, clean=True),
    Situation("one loss for two tasks", Twice, clean=True),
    Situation("probe", Probe, clean=True),
    Situation("probes alone", ProbesAlone, clean=True),
    Situation("encoder of its own", OwnEncoder, clean=True),
    Situation("constant loss", Constant, clean=True),
    Situation("constant loss first", ConstantFirst, clean=True),
    Situation("fresh leaf as a loss", Leaf, clean=True),
    Situation("parameter as a loss", ParameterLoss, clean=True),
    Situation("shared parameter as a loss", functools.partial(SharedParameterLoss, trunk=Scaled), layer="trunk.layer"),
    Situation("loss without a head", WithoutHead, clean=True),
    Situation("trunk's output as a loss", functools.partial(OutputIsLoss, trunk=ScalarTrunk), layer="trunk.layer"),
    Situation("loss with a parameter of its own", LearnedLoss, clean=True),
)
