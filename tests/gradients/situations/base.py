"""What a situation is, and the small model that situations vary: a trunk of width 4, two tasks, float64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mtl import MultiTaskModule, Task

WIDTH, SAMPLES = 4, 5
Loss = dict[str, Tensor]
Part = Callable[[], nn.Module]
PLACES = ("trunk", "features", "last_layer", "module")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def deep(outputs: int = WIDTH) -> nn.Module:
    """Layers whose output is not saved by the operation that made it, so that heads may write into it."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, outputs))


def linear(outputs: int = 1, inputs: int = WIDTH) -> Part:
    return functools.partial(nn.Linear, inputs, outputs)


ONE, THREE = linear(1), linear(3)


def regression(prediction: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(prediction, x[:, :1])


def classification(prediction: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(prediction, x[:, :3].argmax(1))


class Net(MultiTaskModule):
    """Task a regresses, task b classifies, both on labels that are computed from the inputs.

    Args:
        trunk: Makes the trunk.
        a: Makes the head of a.
        b: Makes the head of b.
        lr: The step size of plain descent; with 0 the parameters stay as they are.
        arguments: Those of :class:`MultiTaskModule`.
    """

    def __init__(self, trunk: Part = mlp, a: Part = ONE, b: Part = THREE, *, lr: float = 0.0, **arguments: Any) -> None:
        heads = {"a": a(), "b": b()}
        settings: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=lr)}
        super().__init__(trunk(), heads, {task: Task(F.mse_loss) for task in heads}, **(settings | arguments))
        self.add_parts()
        self.double()

    def add_parts(self) -> None:
        """Add what is neither trunk nor head."""

    def losses(self, x: Tensor) -> Loss:
        z = self.trunk(x)
        return {"a": regression(self.heads["a"](z), x), "b": classification(self.heads["b"](z), x)}

    def task_losses(self, batch: Any) -> Loss:
        return self.losses(batch)


def random_inputs(seed: int) -> Tensor:
    return torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seed_everything(seed: int) -> None:
    """Seed the CPU's generator alone: ``torch.manual_seed`` prepares other devices, too, which takes a millisecond."""
    torch.default_generator.manual_seed(seed)


@dataclass(frozen=True, eq=False)
class Situation:
    """A model with a batch.

    Attributes:
        name: What the tests call it.
        make: Makes the model, given arguments of :class:`MultiTaskModule`; called with a fixed seed.
        layer: The module measured at in the place "module".
        is_last: Whether ``layer`` is the trunk's module with weights that runs last.
        clean: Whether all losses reach the shared parameters through what one call of the trunk returned, so that
            gradients at the features are dL_k/dz.
        refused: Places that are impossible here: ``{place: words of the error}``. A ValueError with these words, one
            of them if they are separated by "|", is as good as the right numbers there.
        hook: What a gradient hook makes of each parameter's final gradient.
        tolerance: Relative to each parameter's largest element, or 1 where that is smaller.
        places: The places that are tried.
        inputs: Makes the batch from a seed.
    """

    name: str
    make: Callable[..., MultiTaskModule]
    layer: str = "trunk.0"
    is_last: bool = True
    clean: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    hook: Callable[[Tensor], Tensor] | None = None
    tolerance: float = 1e-12
    places: tuple[str, ...] = PLACES
    inputs: Callable[[int], Any] = random_inputs

    def build(self, **arguments: Any) -> MultiTaskModule:
        seed_everything(3)
        return self.make(**arguments)

    def at(self, place: str) -> Any:
        return (self.layer,) if place == "module" else place

    def __str__(self) -> str:
        return self.name
