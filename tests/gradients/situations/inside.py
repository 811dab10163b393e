"""Loss terms that come from inside the trunk: regularizers, hidden activations, parameters."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gradients.situations.base import WIDTH, Loss, Net, Situation, classification, deep, regression


class Variational(nn.Module):
    """Keeps a divergence of its hidden layer, as a variational encoder does."""

    divergence: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.hidden(x)
        self.divergence = 0.5 * (mean.pow(2) + mean.exp() - mean - 1).mean()
        result: Tensor = self.out(mean).tanh()
        return result


class Sampled(Variational):
    """The same, with a sample of the hidden layer passed on."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.hidden(x)
        self.divergence = mean.pow(2).mean()
        result: Tensor = self.out(mean + torch.randn_like(mean)).tanh()
        return result


class Apart(Variational):
    """The divergence belongs to a layer that the output does not depend on."""

    def forward(self, x: Tensor) -> Tensor:
        self.divergence = self.hidden(x).pow(2).mean()
        result: Tensor = self.out(x).tanh()
        return result


class Quantized(nn.Module):
    """Replaces features by the nearest entries of a codebook, straight through, and keeps the commitment loss."""

    divergence: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.codebook = nn.Linear(WIDTH, WIDTH), nn.Embedding(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        with torch.no_grad():
            nearest = torch.cdist(z, self.codebook.weight).argmin(1)
        codes = self.codebook(nearest)
        self.divergence = F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())
        result: Tensor = z + (codes - z).detach()
        return result


class Routed(nn.Module):
    """A mixture of two layers with a loss that balances the router."""

    divergence: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(1)
        self.divergence = gates.mean(0).pow(2).sum()
        result: Tensor = (self.experts(x).view(-1, 2, WIDTH) * gates[:, :, None]).sum(1).tanh()
        return result


class InTask(Net):
    """The term is part of some tasks' losses."""

    factors = (0.5, 0.0)

    def losses(self, x: Tensor) -> Loss:
        found = super().losses(x)
        term = self.trunk.divergence
        assert isinstance(term, Tensor)
        factors = zip(found, self.factors, strict=True)
        return {task: found[task] + factor * term if factor else found[task] for task, factor in factors}


class InLast(InTask):
    factors = (0.0, 0.5)


class InBoth(InTask):
    factors = (0.5, 2.0)


class AsTask(Net):
    """The term alone is the loss of task a."""

    def losses(self, x: Tensor) -> Loss:
        found = super().losses(x)
        term = self.trunk.divergence
        assert isinstance(term, Tensor)
        return {"a": term, "b": found["b"]}


class AsPenalty(Net):
    """The term is a penalty."""

    def penalties(self) -> dict[str, Tensor]:
        term = self.trunk.divergence
        assert isinstance(term, Tensor)
        return {"divergence": term}


class PenaltyAndTask(InTask):
    """The term is a penalty and part of a task."""

    def penalties(self) -> dict[str, Tensor]:
        term = self.trunk.divergence
        assert isinstance(term, Tensor)
        return {"divergence": 0.3 * term}


class HiddenActivation(Net):
    """Task a's loss holds the squares of a hidden layer, caught by a forward hook."""

    both = False

    def losses(self, x: Tensor) -> Loss:
        caught: list[Tensor] = []

        def catch(_module: Any, _inputs: Any, output: Tensor) -> None:
            caught.append(output)

        handle = self.trunk.get_submodule("0").register_forward_hook(catch)
        found = super().losses(x)
        handle.remove()
        term = caught[0].pow(2).mean()
        return {"a": found["a"] + term, "b": found["b"] + 0.3 * term if self.both else found["b"]}


class HiddenActivationBoth(HiddenActivation):
    both = True


class CaughtFeatures(Net):
    """A head reads features that a permanent hook caught inside the trunk."""

    def add_parts(self) -> None:
        self.caught: list[Tensor] = []

        def catch(_module: Any, _inputs: Any, output: Tensor) -> None:
            self.caught[:] = [output]

        self.trunk.get_submodule("1").register_forward_hook(catch)

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {
            "a": regression(self.heads["a"](self.caught[0]), x),
            "b": classification(self.heads["b"](z), x),
        }


class CaughtOutput(Net):
    """A permanent hook of the user's catches the trunk's own output, and a head reads what it caught."""

    def add_parts(self) -> None:
        self.caught: list[Tensor] = []

        def catch(_module: Any, _inputs: Any, output: Tensor) -> None:
            self.caught[:] = [output]

        self.trunk.register_forward_hook(catch)

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {
            "a": regression(self.heads["a"](self.caught[0]), x),
            "b": classification(self.heads["b"](z), x),
        }


class WeightDecay(Net):
    """Task a's loss holds the squares of the trunk's parameters."""

    def losses(self, x: Tensor) -> Loss:
        found = super().losses(x)
        squares = torch.stack([p.pow(2).sum() for p in self.trunk.parameters()]).sum()
        return {"a": found["a"] + 0.1 * squares, "b": found["b"]}


class DecayPenalty(Net):
    """Penalties on all parameters, heads among them, and on the features."""

    def losses(self, x: Tensor) -> Loss:
        self.z = self.trunk(x)
        return {"a": regression(self.heads["a"](self.z), x), "b": classification(self.heads["b"](self.z), x)}

    def penalties(self) -> dict[str, Tensor]:
        return {
            "decay": 0.1 * torch.stack([p.pow(2).sum() for p in self.parameters()]).sum(),
            "activity": self.z.pow(2).mean(),
        }


class FeatureNorm(Net):
    """Both tasks' losses hold the squares of the trunk's output."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {
            "a": regression(self.heads["a"](z), x) + z.pow(2).mean(),
            "b": classification(self.heads["b"](z), x) + z.abs().mean(),
        }


def _with(trunk: type[nn.Module], net: type[Net]) -> Any:
    return functools.partial(net, trunk=trunk)


INSIDE = (
    Situation("divergence in task a", _with(Variational, InTask), layer="trunk.out"),
    Situation("divergence in task b", _with(Variational, InLast), layer="trunk.out"),
    Situation("divergence in both tasks", _with(Variational, InBoth), layer="trunk.hidden", is_last=False),
    Situation("divergence as a task", _with(Variational, AsTask), layer="trunk.out"),
    Situation("divergence as a penalty", _with(Variational, AsPenalty), layer="trunk.out", clean=True),
    Situation("divergence as a penalty and in a task", _with(Variational, PenaltyAndTask), layer="trunk.out"),
    Situation("sampled divergence in both tasks", _with(Sampled, InBoth), layer="trunk.out"),
    Situation("divergence of a layer apart", _with(Apart, InTask), layer="trunk.out", is_last=False),
    Situation("divergence of a layer apart as a penalty", _with(Apart, AsPenalty), layer="trunk.out", is_last=False),
    Situation("codebook, commitment in task a", _with(Quantized, InTask), layer="trunk.layer", is_last=False),
    Situation("codebook, commitment in both tasks", _with(Quantized, InBoth), layer="trunk.layer", is_last=False),
    Situation("router balance in task a", _with(Routed, InTask), layer="trunk.experts"),
    Situation("hidden activation in task a", functools.partial(HiddenActivation, trunk=deep), layer="trunk.2"),
    Situation("hidden activation in both tasks", functools.partial(HiddenActivationBoth, trunk=deep), layer="trunk.2"),
    Situation("features caught inside the trunk", functools.partial(CaughtFeatures, trunk=deep), layer="trunk.2"),
    Situation("trunk's output caught by a hook", CaughtOutput),
    Situation("trunk's parameters in task a", WeightDecay),
    Situation("penalties on all parameters", DecayPenalty, clean=True),
    Situation("features themselves in the losses", FeatureNorm, clean=True),
)
