"""The slow and obvious way: one forward pass and one call of autograd a task, on the graph as the user wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_mtl import MultiTaskModule

Gradients = dict[str, Tensor | None]


def task_gradients(module: MultiTaskModule, batch: Any) -> dict[str, Gradients]:
    """dL_k/dp of every parameter p by name, None where the loss of task k does not depend on it."""
    return {task: _gradients(module, module.present_outputs(batch)[task].loss) for task in _present(module, batch)}


def penalty_gradients(module: MultiTaskModule, batch: Any) -> Gradients:
    module.task_losses(batch)
    penalties = module.penalties()
    return _gradients(module, torch.stack(list(penalties.values())).sum()) if penalties else {}


def feature_gradients(module: MultiTaskModule, batch: Any) -> dict[str, Tensor]:
    """The partial derivatives dL_k/dz by all outputs of the trunk that some loss reads, behind each other."""
    outputs: list[Tensor] = []

    def keep(_trunk: nn.Module, _inputs: Any, features: Any) -> Any:
        # A copy of each: where one output is computed from another, its partial derivative is to stay apart.
        copies: dict[Tensor, Tensor] = {}

        def copy(z: Tensor) -> Tensor:
            return copies.setdefault(z, z.clone()) if z.requires_grad else z

        copied = apply_to_collection(features, Tensor, copy)
        outputs.extend(copies.values())
        return copied

    handle = module.trunk.register_forward_hook(keep)
    losses = {task: output.loss for task, output in module.present_outputs(batch).items()}
    handle.remove()
    rows = [torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True) for loss in losses.values()]
    read = [i for i in range(len(outputs)) if any(row[i] is not None for row in rows)]
    pieces = [_flat([outputs[i] for i in read], [row[i] for i in read]) for row in rows]
    return dict(zip(losses, pieces, strict=True))


def rows_at(module: MultiTaskModule, gradients: Mapping[str, Gradients], parameters: list[nn.Parameter]) -> Tensor:
    """The ``[K, n]`` Jacobian of these parameters."""
    names = {p: name for name, p in module.named_parameters()}
    return torch.stack([_flat(parameters, [row[names[p]] for p in parameters]) for row in gradients.values()])


def expected_update(
    module: MultiTaskModule,
    gradients: Mapping[str, Gradients],
    weights: Mapping[str, float],
    penalty: Gradients,
    *,
    weighs_heads: bool,
) -> Gradients:
    """The gradient that every parameter must end up with."""
    shared = set(module.shared_parameters())
    expected: Gradients = {}
    for name, parameter in module.named_parameters():
        pieces = []
        for task, found in gradients.items():
            gradient = found[name]
            if gradient is not None:
                pieces.append(gradient * (weights[task] if weighs_heads or parameter in shared else 1.0))
        extra = penalty.get(name)
        if extra is not None:
            pieces.append(extra)
        expected[name] = torch.stack(pieces).sum(0) if pieces else None
    return expected


def assert_same(found: Gradients, expected: Gradients, tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        actual = found[name]
        if gradient is None:
            assert actual is None, f"{name} takes part in nothing, yet it got a gradient"
        else:
            assert actual is not None, f"{name} got no gradient"
            close = torch.allclose(actual, gradient, rtol=tolerance, atol=tolerance)
            assert close, f"{name} got {actual}, not {gradient}"


def _present(module: MultiTaskModule, batch: Any) -> list[str]:
    return list(module.present_outputs(batch))


def _gradients(module: MultiTaskModule, loss: Tensor) -> Gradients:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True) if trained else ()
    result: Gradients = dict.fromkeys(name for name, _ in module.named_parameters())
    result.update(zip(trained, found, strict=True))
    return result


def _flat(like: list[Any], gradients: Any) -> Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(like, gradients, strict=True)]
    )
