"""Experts of each task and shared ones, in one level."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mtl.architectures.extraction import LevelExperts
from lightning_mtl.architectures.gates import Gate
from lightning_mtl.architectures.ple import PLE


class CGC(PLE):
    r"""Customized gate control: each task mixes experts of its own with experts that all tasks share.

    .. math:: z_k = g_k(x) \cdot [F_k(x); F_s(x)], \qquad g_k(x) = \mathrm{softmax}(W_k x)

    It is :class:`PLE` with one level, down to the names of its parameters.

    Args:
        experts: A function that makes an expert, or lists of modules by task and by ``"shared"``.
        tasks: The tasks' names, as the heads have them.
        gate: The number of features of an input, for a linear gate that flattens it; or a function from the number of
            experts to a module that scores them.
        task_experts: How many experts to make for each task, with a function.
        shared_experts: How many shared experts to make, with a function.

    Shapes, errors and source: as for :class:`PLE`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> trunk = CGC(lambda: nn.Linear(10, 4), ["a", "b"], gate=10, task_experts=2, shared_experts=2)
        >>> {task: list(z.shape) for task, z in trunk(torch.zeros(5, 10)).items()}
        {'a': [5, 4], 'b': [5, 4]}
    """

    def __init__(
        self,
        experts: LevelExperts,
        tasks: Sequence[str],
        gate: Gate,
        *,
        task_experts: int = 1,
        shared_experts: int = 1,
    ) -> None:
        super().__init__([experts], tasks, [gate], task_experts=task_experts, shared_experts=shared_experts)
