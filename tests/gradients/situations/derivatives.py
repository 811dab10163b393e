"""Losses and penalties that hold derivatives by the inputs, and inputs that were made from derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from tests.gradients.situations.base import WIDTH, Loss, Net, Situation, classification, deep, regression


def derivative(y: Tensor, x: Tensor, *, allow_unused: bool = False) -> Tensor:
    """dy/dx, zero where autograd says that y does not depend on x: the idiom of libraries for physics."""
    found: Any  # torch's annotation leaves out the None of allow_unused
    (found,) = torch.autograd.grad(y.sum(), x, create_graph=True, allow_unused=allow_unused)
    return torch.zeros_like(x) if found is None else found


class Physics(Net):
    """Task a is a differential equation u' + u = 0."""

    order, allow_unused = 1, False

    def losses(self, x: Tensor) -> Loss:
        x = x.clone().requires_grad_()
        z = self.trunk(x)
        u = slope = self.heads["a"](z)
        for _ in range(self.order):
            slope = derivative(slope, x, allow_unused=self.allow_unused)
        return {"a": (slope + u).pow(2).mean(), "b": classification(self.heads["b"](z), x.detach())}


class SecondOrder(Physics):
    order = 2


class MayBeUnused(Physics):
    allow_unused = True


class Coupled(Net):
    """Both tasks hold derivatives of both predictions."""

    def losses(self, x: Tensor) -> Loss:
        x = x.clone().requires_grad_()
        z = self.trunk(x)
        u, v = self.heads["a"](z), self.heads["b"](z)
        du, dv = derivative(u, x), derivative(v[:, 0], x)
        return {"a": (du + v[:, :1] * u).pow(2).mean(), "b": (dv * u).pow(2).mean() + classification(v, x.detach())}


class OwnPoints(Net):
    """Task a is an equation on points of its own, task b a boundary value."""

    def losses(self, x: Tensor) -> Loss:
        points = (2 * x[:3]).requires_grad_()
        u = self.heads["a"](self.trunk(points))
        return {
            "a": (derivative(u, points) + u).pow(2).mean(),
            "b": classification(self.heads["b"](self.trunk(x)), x),
        }


class Jacobians(Net):
    """``torch.autograd.functional.jacobian`` of trunk and head."""

    def losses(self, x: Tensor) -> Loss:
        def predict(rows: Tensor) -> Tensor:
            result: Tensor = self.heads["a"](self.trunk(rows)).sum(0)
            return result

        jacobian = torch.autograd.functional.jacobian(predict, x, create_graph=True)
        z = self.trunk(x)
        return {
            "a": jacobian.pow(2).mean() + regression(self.heads["a"](z), x),
            "b": classification(self.heads["b"](z), x),
        }


class FunctionalGrad(Net):
    """``torch.func.vmap`` of ``torch.func.grad``."""

    def losses(self, x: Tensor) -> Loss:
        slopes = torch.func.vmap(torch.func.grad(lambda row: self.heads["a"](self.trunk(row[None])).squeeze()))(x)
        z = self.trunk(x)
        return {
            "a": (slopes.sum(1) - 1).pow(2).mean() + regression(self.heads["a"](z), x),
            "b": classification(self.heads["b"](z), x),
        }


class FunctionalGradAlone(Net):
    """Task a reaches the trunk through ``torch.func`` alone."""

    def losses(self, x: Tensor) -> Loss:
        slopes = torch.func.vmap(torch.func.grad(lambda row: self.heads["a"](self.trunk(row[None])).squeeze()))(x)
        return {"a": (slopes.sum(1) - 1).pow(2).mean(), "b": classification(self.heads["b"](self.trunk(x)), x)}


class ForwardProduct(Net):
    """``torch.func.jvp``."""

    def losses(self, x: Tensor) -> Loss:
        u, du = torch.func.jvp(  # type: ignore[misc]  # three values come with has_aux=True alone
            lambda rows: self.heads["a"](self.trunk(rows)), (x,), (torch.ones_like(x),)
        )
        return {"a": (du + u).pow(2).mean(), "b": classification(self.heads["b"](self.trunk(x)), x)}


class FunctionalCall(Net):
    """``torch.func.functional_call`` of the trunk, by itself and under transforms."""

    def losses(self, x: Tensor) -> Loss:
        parameters: dict[str, Tensor] = dict(self.trunk.named_parameters())

        def call(rows: Tensor) -> Tensor:
            result: Tensor = torch.func.functional_call(self.trunk, parameters, (rows,))
            return result

        slopes = torch.func.vmap(torch.func.grad(lambda row: call(row[None]).sum()))(x)
        return {
            "a": slopes.pow(2).mean() + regression(self.heads["a"](call(x)), x),
            "b": classification(self.heads["b"](self.trunk(x)), x),
        }


class Perturbed(Net):
    """Task a runs the trunk with parameters that were moved along task b's gradient, as meta-learning does."""

    def losses(self, x: Tensor) -> Loss:
        parameters = dict(self.trunk.named_parameters())
        b = classification(self.heads["b"](self.trunk(x)), x)
        gradients = torch.autograd.grad(b, list(parameters.values()), create_graph=True)
        moved = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
        z = torch.func.functional_call(self.trunk, moved, (x,))
        return {"a": regression(self.heads["a"](z), x), "b": b}


class ForwardMode(Net):
    """``torch.autograd.forward_ad``."""

    def losses(self, x: Tensor) -> Loss:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            u, du = forward_ad.unpack_dual(self.heads["a"](self.trunk(dual)))
        return {"a": (du + u).pow(2).mean(), "b": classification(self.heads["b"](self.trunk(x)), x)}


class GradientPenalty(Net):
    """``penalties()`` holds a derivative by the inputs."""

    def losses(self, x: Tensor) -> Loss:
        self.x = x.clone().requires_grad_()
        z = self.trunk(self.x)
        self.prediction = self.heads["a"](z)
        return {"a": regression(self.prediction, x), "b": classification(self.heads["b"](z), x)}

    def penalties(self) -> dict[str, Tensor]:
        return {"gradient": derivative(self.prediction, self.x).pow(2).mean()}


class FeaturePenalty(Net):
    """Task a holds a derivative by the features."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        prediction = self.heads["a"](z.tanh())
        return {
            "a": regression(prediction, x) + derivative(prediction.tanh(), z).pow(2).mean(),
            "b": classification(self.heads["b"](z), x),
        }


class ParameterPenalty(Net):
    """Task a holds the norm of its own gradient by the trunk's parameters."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        a = regression(self.heads["a"](z), x)
        gradients = torch.autograd.grad(a, list(self.trunk.parameters()), create_graph=True)
        sizes = torch.stack([gradient.pow(2).sum() for gradient in gradients])
        return {"a": a + 0.1 * sizes.sum(), "b": classification(self.heads["b"](z), x)}


class Adversarial(Net):
    """The inputs are moved by the sign of a gradient (FGSM)."""

    def losses(self, x: Tensor) -> Loss:
        inputs = x.clone().requires_grad_()
        first = classification(self.heads["b"](self.trunk(inputs)), x)
        (gradient,) = torch.autograd.grad(first, inputs)
        z = self.trunk(x + 0.1 * gradient.sign())
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}


class AdversarialBeside(Adversarial):
    """Task b learns the clean and the moved inputs, task a the clean ones."""

    def losses(self, x: Tensor) -> Loss:
        inputs = x.clone().requires_grad_()
        z = self.trunk(inputs)
        b = classification(self.heads["b"](z), x)
        (gradient,) = torch.autograd.grad(b, inputs, retain_graph=True)
        moved = self.trunk(x + 0.1 * gradient.sign())
        return {"a": regression(self.heads["a"](z), x), "b": b + classification(self.heads["b"](moved), x)}


class Forces(nn.Module):
    """A trunk that differentiates inside: its output holds the derivative of an energy by the inputs."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.softplus) -> None:
        super().__init__()
        self.energy, self.layer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            forces = derivative(self.activation(self.energy(x)).pow(2), x)
        result: Tensor = self.layer(forces + x).tanh()
        return result


DERIVATIVES = (
    Situation("first derivative", Physics),
    Situation("second derivative", SecondOrder),
    Situation("first derivative, deep trunk", functools.partial(Physics, trunk=deep), layer="trunk.2"),
    Situation("first derivative, allow_unused", MayBeUnused),
    Situation("derivatives in both tasks", Coupled),
    Situation("derivatives on points of their own", OwnPoints),
    Situation("autograd.functional.jacobian", Jacobians),
    Situation("torch.func.grad", FunctionalGrad),
    Situation("torch.func.grad alone", FunctionalGradAlone),
    Situation("torch.func.jvp", ForwardProduct),
    Situation("torch.func.functional_call", FunctionalCall),
    Situation("parameters moved by a gradient", Perturbed),
    Situation("forward-mode differentiation", ForwardMode),
    Situation("gradient penalty in penalties()", GradientPenalty, clean=True),
    Situation("derivative by the features", FeaturePenalty),
    Situation("norm of the parameters' gradient", ParameterPenalty),
    Situation("adversarial inputs", Adversarial),
    Situation("adversarial inputs beside clean ones", AdversarialBeside),
    Situation("trunk differentiates inside", functools.partial(Net, trunk=Forces), layer="trunk.layer", clean=True),
)
