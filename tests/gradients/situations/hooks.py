"""Hooks: on parameters, on features, on modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.gradients.situations.base import WIDTH, Loss, Net, Situation, classification, deep, linear, regression
from tests.gradients.situations.sharing import Tied

Hook = Callable[[Tensor], Tensor]


def halved(gradient: Tensor) -> Tensor:
    return 0.5 * gradient


def negated(gradient: Tensor) -> Tensor:
    return -gradient


def clamped(gradient: Tensor) -> Tensor:
    """Not linear: it tells the final gradient from those of single tasks."""
    return gradient.clamp(-0.05, 0.05)


def normalized(gradient: Tensor) -> Tensor:
    result: Tensor = gradient / (1e-3 + gradient.norm())
    return result


class Hooked(Net):
    """A gradient hook on every parameter. The expected gradients are made without, see ``Situation.hook``."""

    active = False

    def on_train_start(self) -> None:
        for parameter in self.parameters():
            parameter.register_hook(self.hook)

    hook: Hook = staticmethod(halved)


def hooked(function: Hook, base: type[Net] = Net) -> Any:
    return type("Hooked", (Hooked, base), {"hook": staticmethod(function)})


class FeatureHook(Net):
    """A hook on the trunk's output halves what comes back."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        z.register_hook(halved)
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class HeadHook(Net):
    """One head negates what it sends back: a gradient reversal by a hook on a tensor of its own."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        own = z * 1
        own.register_hook(negated)
        return {"a": regression(self.heads["a"](own), x), "b": classification(self.heads["b"](z), x)}


class HiddenHook(Net):
    """A hook on a hidden activation of the trunk."""

    def losses(self, x: Tensor) -> Loss:
        hidden = self.trunk.get_submodule("0")(x)
        hidden.register_hook(halved)
        z = self.trunk.get_submodule("2")(self.trunk.get_submodule("1")(hidden))
        whole = self.trunk(x)
        return {"a": regression(self.heads["a"](z + whole), x), "b": classification(self.heads["b"](whole), x)}


class Reversal(torch.autograd.Function):
    """The identity, with the gradient's sign changed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -gradients[0]


class Reversed(Net):
    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        turned: Any = Reversal.apply(z)  # type: ignore[no-untyped-call]
        return {"a": regression(self.heads["a"](turned), x), "b": classification(self.heads["b"](z), x)}


def halve(_module: Any, gradients: Any, _others: Any = None) -> Any:
    return tuple(None if gradient is None else 0.5 * gradient for gradient in gradients)


def with_backward_hook() -> nn.Module:
    """A full backward hook on the trunk changes what reaches its inputs."""
    trunk = deep()
    trunk.register_full_backward_hook(halve)
    return trunk


def with_pre_hook() -> nn.Module:
    """A full backward pre-hook on the trunk changes what comes from its outputs."""
    trunk = deep()
    trunk.register_full_backward_pre_hook(halve)
    return trunk


def with_inner_hook() -> nn.Module:
    """The same on a layer inside the trunk."""
    trunk = deep()
    trunk.get_submodule("2").register_full_backward_hook(halve)
    return trunk


def with_older_hook() -> nn.Module:
    """A hook of the older kind, on the layer's own node: it changes the gradient of the weight, too."""
    trunk = deep()
    trunk.get_submodule("2").register_backward_hook(halve)
    return trunk


def hooked_head() -> nn.Module:
    head = nn.Linear(WIDTH, 1)
    head.register_full_backward_hook(halve)
    return head


HOOKS = (
    Situation("hooks halve all gradients", hooked(halved), hook=halved),
    Situation("hooks negate all gradients", hooked(negated), hook=negated),
    Situation("hooks clamp all gradients", hooked(clamped), hook=clamped),
    Situation("hooks normalize all gradients", hooked(normalized), hook=normalized),
    Situation(
        "hooks clamp gradients of tied weights",
        functools.partial(hooked(clamped, Tied), a=linear(WIDTH)),
        hook=clamped,
    ),
    Situation("hook on the trunk's output", FeatureHook),
    Situation("hook on a head's own tensor", HeadHook, clean=True),
    Situation("hook on a hidden activation", functools.partial(HiddenHook, trunk=deep), layer="trunk.2"),
    Situation("gradient reversal", Reversed, clean=True),
    Situation("full backward hook on the trunk", functools.partial(Net, trunk=with_backward_hook), layer="trunk.2"),
    Situation("full backward pre-hook on the trunk", functools.partial(Net, trunk=with_pre_hook), layer="trunk.2"),
    Situation(
        "full backward hook inside the trunk",
        functools.partial(Net, trunk=with_inner_hook),
        layer="trunk.2",
        clean=True,
    ),
    Situation("older backward hook", functools.partial(Net, trunk=with_older_hook), layer="trunk.2", clean=True),
    Situation("full backward hook on a head", functools.partial(Net, a=hooked_head), clean=True),
)
