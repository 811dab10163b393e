"""Gradients that are taken beside those of a step: of residuals, for kernel traces, and of some of the tasks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.gradients.rows import Rows
from lightning_mtl.gradients.torch_internals import parameter_hooks_off


def kernel_trace(
    residuals: Tensor,
    parameters: Sequence[Tensor],
    probes: int,
    generator: torch.Generator,
    scale: Tensor | None = None,
) -> Tensor:
    r"""Estimate the mean diagonal entry of the neural tangent kernel of N residuals.

    .. math:: \frac{1}{N} \operatorname{tr} K = \frac{1}{N} \sum_n \lVert \nabla_\theta r_n \rVert^2
        = \frac{1}{N} \, \mathbb{E}_v \Big\lVert \nabla_\theta \sum_n v_n r_n \Big\rVert^2

    with v of independent signs, so that the products of different residuals cancel on average. One backward pass a
    probe; the graph is kept.

    Args:
        residuals: r, real, of any shape; without a graph the trace is 0.
        parameters: θ.
        probes: How many draws of v the mean is over.
        generator: Where the signs come from.
        scale: A gradient scaler's factor, which keeps small gradients of half precision from vanishing.

    Returns:
        A scalar, of float32 or wider.

    Example:
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> r = torch.eye(3)[:, :1] * w  # gradients 1, 0 and 0
        >>> kernel_trace(r, [w], 1, torch.Generator())
        tensor(0.3333)
    """
    wide = torch.promote_types(residuals.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=residuals.device)
    if not residuals.requires_grad or not parameters or not residuals.numel():
        return total
    with parameter_hooks_off(parameters):
        for _ in range(probes):
            shape, device = residuals.shape, residuals.device
            signs = torch.randint(0, 2, shape, generator=generator, device=device).to(residuals.dtype) * 2 - 1
            seeds = signs if scale is None else signs * scale.to(signs)
            found = torch.autograd.grad(residuals, list(parameters), seeds, retain_graph=True, allow_unused=True)
            for gradient in found:
                if gradient is not None:
                    whole = gradient.to_dense() if gradient.is_sparse else gradient
                    norm = torch.linalg.vector_norm(whole, dtype=torch.promote_types(whole.dtype, wide))
                    norm = norm.to(total) if scale is None else norm.to(total) / scale.to(total)
                    total = total + norm.square()
    return total / (probes * residuals.numel())


def rows_of(batch: MicroBatch, positions: Sequence[int], shared: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of some tasks' losses, over all ranks, without a scaler's factor; the graph is kept.

    Args:
        batch: The one micro-batch of a step.
        positions: The tasks.
        shared: The shared parameters.

    Returns:
        Real ``[len(positions), n]`` matrices, whose columns together make up the gradients.
    """
    rows = Rows(shared, len(positions))
    with parameter_hooks_off(shared):
        for row, position in enumerate(positions):
            rows.add(row, batch.gradients(position, shared, retain_graph=True))
    rows.sum_over(batch.ranks)
    if batch.ranks.size > 1:  # the shares of a rank are those that an average over the ranks divides
        for row in range(len(positions)):
            rows.scale(row, 1 / batch.ranks.size)
    matrices = rows.matrices()
    return matrices if batch.scale is None else [matrix / batch.scale.to(matrix) for matrix in matrices]
