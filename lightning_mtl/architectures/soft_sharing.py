"""Soft sharing: a backbone for each task, and a penalty that keeps their parameters close."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_mtl.architectures.stages import backbone_per_task, wanted_tasks
from lightning_mtl.devices import WITHOUT_FLOAT64
from lightning_mtl.gradients.micro_batch import surrogate

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
    # MPS has neither float64 nor this decomposition.
    at_home = stacked[0].device.type not in WITHOUT_FLOAT64
    wide = [(matrix if at_home else matrix.cpu()).double() for matrix in stacked]
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
    return value.to(stacked[0]), gradients


Penalty = Literal["distance_to_mean", "pairwise", "trace_norm"]
PENALTIES: Mapping[str, Callable[[Sequence[Sequence[Tensor]], Sequence[float]], ValueAndGradients]] = {
    "distance_to_mean": distance_to_mean,
    "pairwise": pairwise_distance,
    "trace_norm": trace_norm,
}


class SoftSharing(nn.Module):
    r"""Runs one backbone for each task, and keeps the backbones' parameters close by a penalty.

    .. math:: \sum_k L_k + \sum_l s_l\, \Omega(\theta_{1l}, \dots, \theta_{Kl})

    for the parameters l of a backbone, with strength :math:`s_l` and :math:`\Omega` one of

    - ``"distance_to_mean"``: :math:`\sum_k \lVert\theta_{kl} - \bar\theta_l\rVert^2`;
    - ``"pairwise"``: :math:`\sum_{i<j} \lVert\theta_{il} - \theta_{jl}\rVert^2`, which is K times the former;
    - ``"trace_norm"``: the sum of the singular values of the matrix with columns :math:`\mathrm{vec}\,\theta_{kl}`; it
      asks for a common subspace, not for equality, and shrinks the parameters, too.

    The penalty is no task: it is added with weight 1 and logged as ``penalty/soft_sharing``. The trunk returns
    ``{task: features}``, and strength 0 makes it K independent networks.

    Methods that measure gradients at the trunk see all backbones' parameters as the shared ones. No two tasks have a
    gradient in the same place, so that the Gramian is diagonal: gradients never conflict, PCGrad and its kin change
    nothing, and the others weigh by the norms alone.

    Args:
        backbones: ``{task: module}``, a list of modules, or one module that is copied for each of ``tasks``.
        tasks: The tasks' names where ``backbones`` does not have them.
        penalty: The :math:`\Omega` of the list above.
        strength: One number for every parameter, or ``{prefix: number}`` with the names of layers or parameters, as
            ``named_parameters()`` of one backbone has them; the longest prefix that fits counts, ``""`` stands for the
            rest, and what nothing names is free. Only parameters with a strength above 0 have to be alike.

    Raises:
        TypeError: If the backbones are no modules.
        ValueError: If backbones differ in the name or shape of a parameter that is penalized, a prefix fits none, or an
            argument is out of its range.

    Source: Duong et al., Low Resource Dependency Parsing: Cross-lingual Parameter Sharing in a Neural Network Parser,
    2015 (squared distances); Yang and Hospedales, Trace Norm Regularised Deep Multi-Task Learning, 2016,
    arXiv:1606.04038 (the trace norm of the last axis' flattening).

    Deviations: the gradient of the trace norm where the matrix has not full rank is the subgradient of least norm; the
    paper leaves the choice to the singular value decomposition. Second derivatives of the penalty are not available.

    Example:
        >>> trunk = SoftSharing(nn.Linear(4, 3), tasks=["near", "far"], strength={"weight": 0.5})
        >>> {task: list(features.shape) for task, features in trunk(torch.zeros(2, 4)).items()}
        {'near': [2, 3], 'far': [2, 3]}
        >>> _ = trunk.backbones["near"].weight.data.fill_(0.0), trunk.backbones["far"].weight.data.fill_(1.0)
        >>> trunk.penalties()["soft_sharing"].item()  # 0.5 times 2 * 12 differences of 0.5, squared
        3.0
    """

    takes_tasks: ClassVar[bool] = True

    def __init__(
        self,
        backbones: Mapping[str, nn.Module] | Sequence[nn.Module] | nn.Module,
        tasks: Sequence[str] | None = None,
        *,
        penalty: Penalty = "distance_to_mean",
        strength: float | Mapping[str, float] = 1e-3,
    ) -> None:
        super().__init__()
        if penalty not in PENALTIES:
            raise ValueError(f"SoftSharing(penalty={penalty!r}) must be one of {list(PENALTIES)}.")
        given = backbone_per_task("SoftSharing", backbones, tasks)
        for task, backbone in given.items():
            if not isinstance(backbone, nn.Module):
                raise TypeError(
                    f"SoftSharing: the backbone of task {task!r} must be a module, found {type(backbone).__name__}; "
                    "wrap stages in nn.Sequential."
                )
        self.tasks = tuple(given)
        self.penalty = penalty
        self.backbones = nn.ModuleDict(given)
        strengths = _strength_of_each(given.values(), strength)
        _check_alike(given, strengths)
        self._strengths = list(strengths.values())
        # The parameters' owners: what moves or shards a module may replace the parameters themselves.
        self._owners = [[_owner(backbone, name) for name in strengths] for backbone in given.values()]

    def forward(self, *inputs: Any, tasks: Sequence[str] | None = None, **named: Any) -> dict[str, Any]:  # noqa: ANN401
        """Run the backbones of ``tasks``, all of them where None."""
        wanted = wanted_tasks("SoftSharing", self.tasks, tasks)
        return {task: self.backbones[task](*inputs, **named) for task in wanted}

    def penalties(self) -> dict[str, Tensor]:
        """Compute ``{"soft_sharing": penalty}``; empty where nothing has a strength, or there is one task.

        Raises:
            TypeError: If parameters are sharded.
        """
        networks = [[getattr(owner, name) for owner, name in parameters] for parameters in self._owners]
        trained = [[p.requires_grad for p in parameters] for parameters in networks]
        if len(networks) == 1 or not any(map(any, trained)):
            return {}
        if isinstance(networks[0][0], DTensor):
            raise TypeError(
                "SoftSharing compares whole parameters, of which a sharded model has parts; leave the trunk unsharded "
                "with strategy='ddp', or set strength=0."
            )
        with torch.no_grad(), torch.autocast(networks[0][0].device.type, enabled=False):
            value, gradients = PENALTIES[self.penalty](networks, self._strengths)
        moved = list(_flat_where(networks, trained))
        known = list(_flat_where(gradients, trained))
        return {"soft_sharing": surrogate(value, moved, lambda outer: torch._foreach_mul(known, outer))}

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """Return the parameters of a task's backbone, which no other task's loss depends on."""
        return list(self.backbones[task].parameters())

    def single_task(self, task: str) -> nn.Module:
        """Return the backbone of one task.

        Raises:
            ValueError: If there is no such task.
        """
        wanted_tasks("SoftSharing", self.tasks, [task])
        return self.backbones[task]


def _flat_where(rows: Sequence[Sequence[Tensor]], mask: Sequence[Sequence[bool]]) -> Iterator[Tensor]:
    for row, kept in zip(rows, mask, strict=True):
        yield from (tensor for tensor, keep in zip(row, kept, strict=True) if keep)


def _strength_of_each(backbones: Iterable[nn.Module], strength: float | Mapping[str, float]) -> dict[str, float]:
    """The strength of each parameter that has one above 0."""
    names = list(dict.fromkeys(name for backbone in backbones for name, _ in backbone.named_parameters()))
    by_prefix = dict(strength) if isinstance(strength, Mapping) else {"": strength}
    for prefix, value in by_prefix.items():
        if not (math.isfinite(value) and value >= 0):
            where = f"{{{prefix!r}: {value}}}" if isinstance(strength, Mapping) else value
            raise ValueError(f"SoftSharing(strength={where}) must be finite and at least 0.")
        if not any(_fits(prefix, name) for name in names):
            raise ValueError(
                f"SoftSharing(strength=...) names {prefix!r}, which is no parameter or layer of a backbone; it has "
                f"{names}."
            )
    found = {}
    for name in names:
        fitting = [prefix for prefix in by_prefix if _fits(prefix, name)]
        value = by_prefix[max(fitting, key=len)] if fitting else 0.0
        if value > 0:
            found[name] = float(value)
    return found


def _fits(prefix: str, name: str) -> bool:
    return prefix in ("", name) or name.startswith(f"{prefix}.")


def _check_alike(backbones: Mapping[str, nn.Module], strengths: Mapping[str, float]) -> None:
    """Refuse backbones whose penalized parameters do not lie side by side."""
    shapes = {task: {name: p.shape for name, p in backbone.named_parameters()} for task, backbone in backbones.items()}
    for name in strengths:
        first = next(task for task in backbones if name in shapes[task])
        for task in backbones:
            if name not in shapes[task]:
                raise ValueError(
                    f"SoftSharing: parameter {name!r} of task {first!r} has no counterpart in the backbone of task "
                    f"{task!r}, which has {list(shapes[task])}; penalize common layers alone with strength={{prefix: "
                    "number}}."
                )
            if shapes[task][name] != shapes[first][name]:
                raise ValueError(
                    f"SoftSharing: parameter {name!r} has shape {list(shapes[first][name])} for task {first!r} and "
                    f"{list(shapes[task][name])} for task {task!r}; make them alike, or leave the layer out with "
                    "strength={prefix: number}."
                )


def _owner(backbone: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return backbone.get_submodule(path), attribute
