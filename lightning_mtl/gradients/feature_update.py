"""The update whose weights act at the trunk's output: heads once, trunk once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_mtl.gradients.compiled import check_repeatable
from lightning_mtl.gradients.heads import HeadPasses
from lightning_mtl.gradients.inject import inject
from lightning_mtl.gradients.inner_products import gramian, row_norms
from lightning_mtl.gradients.micro_batch import (
    Decide,
    Measured,
    MicroBatch,
    add_gradients,
    measured_gramian,
    measured_norms,
    weighted_head_gradients,
)
from lightning_mtl.gradients.rows import Rows

Wanted = Literal["nothing", "norms", "gramian", "rows"]


def feature_objective(
    batch: MicroBatch,
    losses: Tensor,
    decide: Decide,
    *,
    wanted: Wanted,
    layer: Sequence[Tensor] | None,
    weighs_heads: bool,
    shared: Callable[[], Sequence[Tensor]],
) -> Tensor:
    r"""Build the scalar whose one backward pass applies the weights at the trunk's output z.

    The heads are differentiated down to :math:`c_k = \partial L_k / \partial z`; the trunk then sees
    :math:`\sum_k w_k c_k`, so that its parameters get :math:`\sum_k w_k \nabla_\theta L_k` for the price of one pass.

    Args:
        batch: The losses and the cut.
        losses: ``[K]``, the losses over all ranks, to report.
        decide: Turns the measurements into weights or a direction.
        wanted: What to measure.
        layer: The parameters to measure at; None measures c_k itself.
        weighs_heads: Whether each head's gradients are scaled by its task's weight, too.
        shared: Lists the shared parameters: what a head does with one of them, as where weights are tied, is weighted
            in any case.

    Returns:
        The weighted sum of the losses plus the penalty, with that backward pass.
    """
    num_tasks = len(batch.losses)
    every_head = HeadPasses(batch).all()
    heads, penalty_heads = every_head[:num_tasks], every_head[num_tasks:]
    used = [
        i
        for i in range(len(batch.cut.outputs))
        # A graph that is the same on all ranks has every output in it.
        if batch.ranks.size > 1 or any(head.cotangents[i] is not None for head in every_head)
    ]
    outputs = [batch.cut.outputs[i] for i in used]
    cotangents = [[head.cotangents[i] for i in used] for head in heads]
    measured = _measure(batch, cotangents, outputs, layer, wanted)
    decision = decide(measured)
    parameters = list(dict.fromkeys(p for head in every_head for p in head.parameters))
    head_weights = decision.for_heads(weighs_heads=weighs_heads)
    per_task = [head.parameters for head in heads]
    tied = [] if head_weights is decision.weights else _split_off(per_task, shared())

    def gradients(scaled: Tensor) -> list[Tensor]:
        outer = batch.unscaled(scaled)
        if not outputs:  # a rank whose batch is empty has no features, and takes part with what others measured
            down = []
        elif decision.directions is not None:
            down = [direction * outer for direction in decision.directions]
        else:
            down = combine(cotangents, measured.rows, outputs, decision.weights * outer)
        above = weighted_head_gradients(per_task, head_weights, outer)
        if tied:
            above.update(weighted_head_gradients(tied, decision.weights, outer))
        for penalty in penalty_heads:
            for direction, i in zip(down, used, strict=True):
                if (cotangent := penalty.cotangents[i]) is not None:
                    direction.add_((cotangent * outer).reshape(direction.shape))
            add_gradients(above, penalty.parameters, [outer * gradient for gradient in penalty.parameters.values()])
        return [
            *(direction.view(z.shape) for direction, z in zip(down, outputs, strict=True)),
            *(above[parameter] for parameter in parameters),
        ]

    value = (losses * decision.weights).sum()
    if batch.penalty is not None:
        value = value + batch.penalty.detach()
    return inject(value, [*outputs, *parameters], lambda outer: in_full_precision(gradients, outer))


def _split_off(per_task: Sequence[dict[Tensor, Tensor]], shared: Sequence[Tensor]) -> list[dict[Tensor, Tensor]]:
    """Take the gradients of shared parameters out of those of the heads; empty where no head uses any."""
    tied = {parameter for gradients in per_task for parameter in gradients}.intersection(shared)
    return [{p: gradients.pop(p) for p in tied if p in gradients} for gradients in per_task] if tied else []


def in_full_precision(gradients: Callable[[Tensor], list[Tensor]], outer: Tensor) -> list[Tensor]:
    """Compute gradients outside autocast, whichever thread autograd calls from."""
    with torch.autocast(outer.device.type, enabled=False):
        return gradients(outer)


def combine(
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
        for weight, head in zip(weights.to(z).unbind(), cotangents, strict=True):
            cotangent = head[index]
            if cotangent is None:
                continue
            direction = cotangent * weight if direction is None else direction.addcmul_(cotangent, weight)
        total.append(torch.zeros_like(z) if direction is None else direction)
    return total


def _measure(
    batch: MicroBatch,
    cotangents: Sequence[Sequence[Tensor | None]],
    outputs: Sequence[Tensor],
    layer: Sequence[Tensor] | None,
    wanted: Wanted,
) -> Measured:
    if wanted == "nothing":
        return Measured()
    if layer is not None:
        return _measure_layer(batch, cotangents, outputs, layer, wanted)
    return measure_features(batch, cotangents, outputs, wanted)


def measure_features(
    batch: MicroBatch, cotangents: Sequence[Sequence[Tensor | None]], outputs: Sequence[Tensor], wanted: Wanted
) -> Measured:
    """Measure the gradients of the trunk's outputs themselves, over the samples of all ranks."""
    if wanted == "nothing":
        return Measured()
    if not outputs:  # a rank whose batch is empty
        outputs, cotangents = [torch.zeros(1, device=batch.losses[0].device)], [[None]] * len(cotangents)
    rows = [
        torch.stack([(z.new_zeros(z.shape) if head[i] is None else head[i]).reshape(-1) for head in cotangents])  # type: ignore[union-attr]
        for i, z in enumerate(outputs)
    ]
    if wanted == "gramian":
        return measured_gramian(gramian(rows, batch.ranks, share=1 / batch.ranks.size**2), batch.scale, rows)
    return measured_norms(row_norms(rows, batch.ranks, share=1 / batch.ranks.size**2), batch.scale, rows)


def _measure_layer(
    batch: MicroBatch,
    cotangents: Sequence[Sequence[Tensor | None]],
    outputs: Sequence[Tensor],
    layer: Sequence[Tensor],
    wanted: Wanted,
) -> Measured:
    check_repeatable(outputs)
    if wanted == "norms" and batch.ranks.size == 1:
        norms = []
        for head in cotangents:
            found = [gradient for gradient in gradients_from_cut(outputs, head, layer) if gradient is not None]
            # A task may pass the layer by, as where each task has a branch of its own.
            parts = torch._foreach_norm(found) if found else [outputs[0].new_zeros(())]
            norms.append(torch.linalg.vector_norm(torch.stack(parts)))
        return measured_norms(torch.stack(norms), batch.scale)
    rows = Rows(layer, len(cotangents))
    for task, head in enumerate(cotangents):
        rows.add(task, gradients_from_cut(outputs, head, layer))
    rows.average_over(batch.ranks)
    if wanted == "norms":
        return measured_norms(rows.norms(), batch.scale)
    return measured_gramian(rows.gramian(), batch.scale)


def gradients_from_cut(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    parameters: Sequence[Tensor],
    *,
    retain_graph: bool = True,
) -> Sequence[Tensor | None]:
    """Carry one task's cotangents through the trunk, down to ``parameters``; None where they do not reach."""
    pairs = [(z, c) for z, c in zip(outputs, cotangents, strict=True) if c is not None]
    if not pairs:
        return [None] * len(parameters)
    return torch.autograd.grad(
        [z for z, _ in pairs], parameters, [c for _, c in pairs], retain_graph=retain_graph, allow_unused=True
    )
