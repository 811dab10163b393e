"""How far the parameters of several equal networks are apart, with the gradient; autograd takes no part in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Below this ratio to the largest eigenvalue of W W^T, in float64, a singular value of W is rounding.
RANK_TOLERANCE = 1e-14

ValueAndGradients = tuple[Tensor, list[list[Tensor]]]
"""A penalty's value, a scalar, and its gradients, one list a network."""


def distance_to_mean(networks: Sequence[Sequence[Tensor]], strengths: Sequence[float]) -> ValueAndGradients:
    r"""Compute :math:`\sum_l s_l \sum_k \lVert\theta_{kl} - \bar\theta_l\rVert^2`.

    Args:
        networks: K lists of L tensors, alike in shape.
        strengths: L numbers.

    Example:
        >>> value, gradients = distance_to_mean([[torch.tensor([1.0])], [torch.tensor([3.0])]], [0.5])
        >>> value, gradients
        (tensor(1.), [[tensor([-1.])], [tensor([1.])]])
    """
    roots = [strength**0.5 for strength in strengths]
    means = list(networks[0])
    for tensors in networks[1:]:
        means = list(torch._foreach_add(means, list(tensors)))
    means = list(torch._foreach_div(means, len(networks)))
    scaled = []
    for tensors in networks:
        differences = list(torch._foreach_sub(list(tensors), means))
        torch._foreach_mul_(differences, roots)
        scaled.append(differences)
    value = torch.nn.utils.get_total_norm([tensor for tensors in scaled for tensor in tensors]).square()
    # The mean moves with each network, but the differences sum to zero, so that its part of the gradient does, too.
    for tensors in scaled:
        torch._foreach_mul_(tensors, [2 * root for root in roots])
    return value, scaled


def pairwise_distance(networks: Sequence[Sequence[Tensor]], strengths: Sequence[float]) -> ValueAndGradients:
    r"""Compute :math:`\sum_l s_l \sum_{i<j} \lVert\theta_{il} - \theta_{jl}\rVert^2`, K times the distance to the mean.

    Example:
        >>> pairwise_distance([[torch.tensor([1.0])], [torch.tensor([3.0])]], [0.5])[0]
        tensor(2.)
    """
    return distance_to_mean(networks, [len(networks) * strength for strength in strengths])


def trace_norm(networks: Sequence[Sequence[Tensor]], strengths: Sequence[float]) -> ValueAndGradients:
    r"""Compute :math:`\sum_l s_l \lVert[\mathrm{vec}\,\theta_{1l}, \dots, \mathrm{vec}\,\theta_{Kl}]\rVert_*`.

    The singular values come from the K x K Gramian in float64, all layers at once. Where the matrix has not full rank,
    as for copies of one network, the gradient is the subgradient of least norm, which leaves copies copies.

    Example:
        >>> value, gradients = trace_norm([[torch.tensor([3.0, 0.0])], [torch.tensor([0.0, 4.0])]], [1.0])
        >>> value, gradients
        (tensor(7.), [[tensor([1., 0.])], [tensor([0., 1.])]])
    """
    stacked = [torch.stack([tensor.flatten() for tensor in layer]) for layer in zip(*networks, strict=True)]
    exact = torch.float32 if stacked[0].device.type == "mps" else torch.float64
    wide = [matrix.to(exact) for matrix in stacked]
    eigenvalues, vectors = torch.linalg.eigh(torch.stack([matrix @ matrix.T for matrix in wide]))
    singular = eigenvalues.clamp(min=0).sqrt()
    known = eigenvalues > RANK_TOLERANCE * eigenvalues[:, -1:]
    inverse = torch.where(known, singular, torch.ones_like(singular)).reciprocal() * known
    scales = singular.new_tensor(strengths)
    value = (scales * singular.sum(1)).sum()
    whiteners = scales[:, None, None] * (vectors * inverse[:, None, :]) @ vectors.mT
    # W (W^T W)^(-1/2), with the networks as rows.
    moves = [(whitener @ matrix).to(layer) for whitener, matrix, layer in zip(whiteners, wide, stacked, strict=True)]
    gradients = [
        [move[k].view_as(tensor) for move, tensor in zip(moves, tensors, strict=True)]
        for k, tensors in enumerate(networks)
    ]
    return value.to(stacked[0].dtype), gradients
