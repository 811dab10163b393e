"""What a step has to be: each loss differentiated by itself, by every parameter, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_mtl import BalancedModule

Gradients = dict[str, dict[str, Tensor]]
"""For each task the gradients of the parameters that it reaches, by name."""


def gradients(module: BalancedModule, batch: object, tasks: Sequence[str] | None = None) -> Gradients:
    losses = {task: output.loss for task, output in module.present_outputs(batch).items()}
    found: Gradients = {}
    for task in module.tasks if tasks is None else tasks:
        names, parameters = zip(*module.named_parameters(), strict=True)
        given: Sequence[Tensor | None] = torch.autograd.grad(
            losses[task], parameters, retain_graph=True, allow_unused=True
        )
        found[task] = {name: gradient for name, gradient in zip(names, given, strict=True) if gradient is not None}
    return found


def shared(found: Gradients) -> set[str]:
    """The parameters that two tasks or more reach."""
    names = [name for own in found.values() for name in own]
    return {name for name in names if names.count(name) > 1}


def gramian(found: Gradients, names: set[str]) -> Tensor:
    return torch.stack(
        [
            torch.stack(
                [sum_of(torch.sum(a[n] * b[n]) for n in sorted(names & a.keys() & b.keys())) for b in found.values()]
            )
            for a in found.values()
        ]
    )


def sum_of(parts: object) -> Tensor:
    return torch.stack([torch.zeros((), dtype=torch.float64), *parts]).sum()  # type: ignore[misc]


def update(
    found: Gradients, names: set[str], weights: Mapping[str, float], heads: Mapping[str, float]
) -> dict[str, Tensor]:
    """What each parameter gets: Σ w_k g_k where tasks share it, and v_k g_k where one alone reaches it."""
    total: dict[str, Tensor] = {}
    for task, own in found.items():
        for name, gradient in own.items():
            part = gradient * (weights if name in names else heads)[task]
            total[name] = total[name] + part if name in total else part
    return total
