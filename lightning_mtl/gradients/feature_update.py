"""The update whose weights act at the trunk's output: heads once, trunk once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_mtl.gradients.heads import check_reaches_trunk, differentiate_heads
from lightning_mtl.gradients.inject import inject
from lightning_mtl.gradients.inner_products import gramian, row_norms
from lightning_mtl.gradients.micro_batch import Decide, Measured, MicroBatch, weighted_head_gradients
from lightning_mtl.gradients.rows import Rows

Wanted = Literal["nothing", "norms", "gramian", "rows"]


def feature_objective(
    batch: MicroBatch, decide: Decide, *, wanted: Wanted, layer: Sequence[Tensor] | None, weighs_heads: bool
) -> Tensor:
    r"""Build the scalar whose one backward pass applies the weights at the trunk's output z.

    The heads are differentiated down to :math:`c_k = \partial L_k / \partial z`; the trunk then sees
    :math:`\sum_k w_k c_k`, so that its parameters get :math:`\sum_k w_k \nabla_\theta L_k` for the price of one pass.

    Args:
        batch: The losses and the cut.
        decide: Turns the measurements into weights or a direction.
        wanted: What to measure.
        layer: The parameters to measure at; None measures c_k itself.
        weighs_heads: Whether each head's gradients are scaled by its task's weight, too.

    Returns:
        The weighted sum of the losses plus the penalty, with that backward pass.
    """
    num_tasks, penalties = len(batch.losses), [] if batch.penalty is None else [batch.penalty]
    every_head = differentiate_heads([*batch.losses, *penalties], batch.cut)
    check_reaches_trunk(batch.names, every_head)
    heads, penalty_heads = every_head[:num_tasks], every_head[num_tasks:]
    used = [i for i in range(len(batch.cut.outputs)) if any(head.cotangents[i] is not None for head in every_head)]
    outputs = [batch.cut.outputs[i] for i in used]
    cotangents = [[head.cotangents[i] for i in used] for head in heads]
    measured = _measure(cotangents, outputs, layer, wanted)
    decision = decide(measured)
    parameters = list(dict.fromkeys(p for head in every_head for p in head.parameters))

    def gradients(outer: Tensor) -> list[Tensor]:
        if decision.directions is not None:
            down = [direction * outer for direction in decision.directions]
        else:
            down = _combine(cotangents, measured.rows, outputs, decision.weights * outer)
        above = weighted_head_gradients(
            [head.parameters for head in heads], decision.weights if weighs_heads else None, outer
        )
        for penalty in penalty_heads:
            for direction, i in zip(down, used, strict=True):
                if (cotangent := penalty.cotangents[i]) is not None:
                    direction.add_((cotangent * outer).reshape(direction.shape))
            for parameter, gradient in weighted_head_gradients([penalty.parameters], None, outer).items():
                above[parameter] = above[parameter] + gradient if parameter in above else gradient
        return [
            *(direction.view(z.shape) for direction, z in zip(down, outputs, strict=True)),
            *(above[parameter] for parameter in parameters),
        ]

    value = (batch.stacked().detach() * decision.weights).sum() + sum(penalty.detach() for penalty in penalties)
    return inject(value, [*outputs, *parameters], gradients)


def _combine(
    cotangents: Sequence[Sequence[Tensor | None]],
    rows: Sequence[Tensor],
    outputs: Sequence[Tensor],
    weights: Tensor,
) -> list[Tensor]:
    """Compute Σ w_k c_k for each output, from the stacked rows where measuring has made them."""
    if rows:
        return [weights.to(block) @ block for block in rows]
    total: list[Tensor] = []
    for index, z in enumerate(outputs):
        direction: Tensor | None = None
        for task, head in enumerate(cotangents):
            cotangent = head[index]
            if cotangent is None:
                continue
            weight = weights[task].to(cotangent)
            direction = cotangent * weight if direction is None else direction.addcmul_(cotangent, weight)
        total.append(torch.zeros_like(z) if direction is None else direction)
    return total


def _measure(
    cotangents: Sequence[Sequence[Tensor | None]],
    outputs: Sequence[Tensor],
    layer: Sequence[Tensor] | None,
    wanted: Wanted,
) -> Measured:
    if wanted == "nothing":
        return Measured()
    if layer is not None:
        return _measure_layer(cotangents, outputs, layer, wanted)
    rows = [
        torch.stack([(z.new_zeros(z.shape) if head[i] is None else head[i]).reshape(-1) for head in cotangents])  # type: ignore[union-attr]
        for i, z in enumerate(outputs)
    ]
    if wanted == "gramian":
        products = gramian(rows)
        return Measured(gramian=products, norms=products.diagonal().sqrt(), rows=rows)
    return Measured(norms=row_norms(rows), rows=rows)


def _measure_layer(
    cotangents: Sequence[Sequence[Tensor | None]], outputs: Sequence[Tensor], layer: Sequence[Tensor], wanted: Wanted
) -> Measured:
    jacobian = Rows(layer, len(cotangents)) if wanted == "gramian" else None
    norms = []
    for task, head in enumerate(cotangents):
        gradients = gradients_from_cut(outputs, head, layer)
        if jacobian is not None:
            jacobian.add(task, gradients)
        else:
            parts = torch._foreach_norm([gradient for gradient in gradients if gradient is not None])
            norms.append(torch.linalg.vector_norm(torch.stack(parts)) if parts else outputs[0].new_zeros(()))
    if jacobian is not None:
        products = jacobian.gramian()
        return Measured(gramian=products, norms=products.diagonal().sqrt())
    return Measured(norms=torch.stack(norms))


def gradients_from_cut(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool = True,
) -> Sequence[Tensor | None]:
    """Carry one task's cotangents through the trunk, down to ``parameters``; None where they do not reach."""
    pairs = [(z, c) for z, c in zip(outputs, cotangents, strict=True) if c is not None]
    return torch.autograd.grad(
        [z for z, _ in pairs], parameters, [c for _, c in pairs], retain_graph=retain_graph, allow_unused=True
    )
