"""The expected gradients: plain autograd, one fresh model, one forward pass and one backward pass for each task.

Nothing of the library's training runs here: ``task_losses`` and ``penalties`` are called in a plain loop.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_mtl import MultiTaskModule
from tests.gradients.situations.base import Situation, seed_everything

SEED = 11  # of the random numbers inside a training step, dropout for instance
Gradients = dict[str, Tensor | None]


@dataclass(frozen=True)
class PerTask:
    """One step's gradients.

    Attributes:
        tasks: dL_k/dp by the names of tasks and parameters; None where the loss does not depend on the parameter.
        penalty: The same of the sum of the penalties.
        features: dL_k/dz, flat, by task; None where the trunk returns no tensors.
        buffers: The model's buffers after the step.
        shared: The names of the shared parameters.
        layer: The names of the parameters of the situation's layer.
    """

    tasks: Mapping[str, Gradients]
    penalty: Gradients
    features: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    shared: tuple[str, ...]
    layer: tuple[str, ...]

    def weighted(self, weights: Mapping[str, float], heads: Mapping[str, float]) -> Gradients:
        """Σ_k w_k dL_k/dp: the weights of the tasks for shared parameters, those for heads for all others."""
        expected: Gradients = {}
        for name, penalty in self.penalty.items():
            factors = weights if name in self.shared else heads
            pieces = [factors[k] * g for k, own in self.tasks.items() if (g := own[name]) is not None]
            pieces += [] if penalty is None else [penalty]
            expected[name] = torch.stack(pieces).sum(0) if pieces else None
        return expected

    def rows(self, names: Sequence[str], like: Mapping[str, Tensor]) -> Tensor:
        """The Jacobian of the tasks' losses by these parameters, ``[K, n]``, real."""
        return torch.stack([_flat([own[n] for n in names], [like[n] for n in names]) for own in self.tasks.values()])

    def gramian(self, place: str, like: Mapping[str, Tensor]) -> Tensor:
        """The inner products of the tasks' gradients at a place, ``[K, K]``."""
        if place == "features":
            rows = torch.stack(list(self.features.values()))
        else:
            rows = self.rows(self.shared if place == "trunk" else self.layer, like).double()
        return rows @ rows.T


@functools.cache
def per_task(situation: Situation, seed: int = 0) -> PerTask:
    """The gradients of a situation's batch of this seed."""
    return gradients_of(situation.build, situation.inputs(seed), situation.layer, clean=situation.clean)


def gradients_of(build: Any, batch: Any, layer: str, *, clean: bool = False) -> PerTask:
    """The gradients of the models that ``build`` makes, all alike, on a batch."""
    tasks: dict[str, Gradients] = {}
    features: dict[str, Tensor] = {}
    module: MultiTaskModule = build()
    present = list(_losses(module, batch))
    for task in [k for k in module.tasks if k in present]:
        tasks[task], features[task] = _one_task(build(), batch, task, clean=clean)
    module = build()
    _losses(module, batch)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    penalties = module.penalties()
    penalty = _by_parameters(module, torch.stack(list(penalties.values())).sum() if penalties else None)
    names = {p: name for name, p in module.named_parameters()}
    shared = tuple(names[p] for p in module.shared_parameters() if p.requires_grad)
    at = tuple(names[p] for p in module.get_submodule(layer).parameters() if p.requires_grad)
    return PerTask(tasks, penalty, features, buffers, shared, at)


def _losses(module: MultiTaskModule, batch: Any) -> dict[str, Tensor]:
    seed_everything(SEED)
    return dict(module.task_losses(batch))  # type: ignore[arg-type]  # the situations return tensors


def _one_task(module: MultiTaskModule, batch: Any, task: str, *, clean: bool) -> tuple[Gradients, Tensor]:
    outputs: list[Tensor] = []
    if clean:

        def keep(_trunk: Any, _inputs: Any, features: Any) -> None:
            apply_to_collection(features, Tensor, lambda z: outputs.append(z) if z.requires_grad else None)

        module.trunk.register_forward_hook(keep)
    loss = _losses(module, batch)[task]
    found = _grad(loss, outputs, retain_graph=True) if outputs else []
    return _by_parameters(module, loss), _flat(found, outputs) if outputs else torch.zeros(0)


def _by_parameters(module: MultiTaskModule, loss: Tensor | None) -> Gradients:
    result: Gradients = dict.fromkeys(name for name, _ in module.named_parameters())
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = [None] * len(trained) if loss is None else _grad(loss, list(trained.values()))
    result.update(zip(trained, found, strict=True))
    return result


def _grad(loss: Tensor, inputs: list[Any], *, retain_graph: bool = False) -> list[Tensor | None]:
    if not loss.requires_grad:
        return [None] * len(inputs)
    # torch's annotation leaves out the None of allow_unused.
    found: Any = torch.autograd.grad(loss.sum(), inputs, retain_graph=retain_graph, allow_unused=True)
    return [None if gradient is None else dense(gradient) for gradient in found]


def dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient.clone()


def _flat(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    pieces = [(torch.zeros_like(p) if g is None else g).detach() for g, p in zip(gradients, like, strict=True)]
    return torch.cat([(torch.view_as_real(piece) if piece.is_complex() else piece).flatten() for piece in pieces])
