"""MMoE: shared experts, mixed for each task by a gate of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_mtl.architectures.experts import Experts, Gate, build_gate, expert_group, gate_weights, mix_for_each
from lightning_mtl.architectures.stages import all_but_own, checked_tasks, wanted_tasks
from lightning_mtl.monitors.gates import GateMeter, GateTable


class MMoE(nn.Module):
    r"""Mixes the same experts for every task by a gate of its own (multi-gate mixture-of-experts).

    .. math:: z_k = \sum_{e=1}^{E} g_k(x)_e \, f_e(x), \qquad g_k(x) = \mathrm{softmax}(W_k x)

    With one expert it is hard sharing: the gate's weight is 1.

    Args:
        experts: Modules that take the input and return outputs of one shape, used as they are; or a function that makes
            one, such as ``lambda: nn.Sequential(nn.Linear(30, 16), nn.ReLU())``. Equal MLPs from a function are
            computed together, with parameters ``[E, ...]`` named as in one of them.
        tasks: The tasks' names, as the heads have them.
        gate: The number of features of an input, for a linear gate that flattens it; or a function from the number of
            experts to a module that scores them, ``[B, E]``, in place of :math:`W_k x`.
        num_experts: How many experts to make, with a function.

    Shapes: ``[B, ...]`` to ``{task: [B, ...]}``, each entry as one expert returns it.

    Raises:
        ValueError: If a number is out of range or contradicts another; in ``forward``, naming the expert or the gate,
            if shapes do not fit.
        TypeError: If an argument is of the wrong kind.

    The experts alone are shared: :meth:`shared_parameters` leaves the gates out. Each task has an output of its own, so
    that ``at="features"`` finds gradients that never conflict; measure at the trunk.

    Source: Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, KDD 2018.

    Example:
        >>> trunk = MMoE(lambda: nn.Linear(10, 4), ["a", "b"], gate=10, num_experts=3)
        >>> {task: list(z.shape) for task, z in trunk(torch.zeros(5, 10)).items()}
        {'a': [5, 4], 'b': [5, 4]}
    """

    takes_tasks: ClassVar[bool] = True

    def __init__(self, experts: Experts, tasks: Sequence[str], gate: Gate, *, num_experts: int | None = None) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks, "MMoE")
        self.experts = expert_group(experts, num_experts, "MMoE")
        self.num_experts = self.experts.num_experts
        self.gates = nn.ModuleDict(
            {task: build_gate(gate, self.num_experts, f"The gate of task {task!r} in MMoE") for task in self.tasks}
        )
        self.gate_meter = GateMeter()

    def forward(self, x: Tensor, *, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Mix the experts for each of ``tasks``, for all tasks where None."""
        wanted = wanted_tasks("MMoE", self.tasks, tasks)
        # Gates first, so that the layer that runs last is one that all tasks share.
        weights = {
            task: gate_weights(gate, x, self.num_experts, f"The gate of task {task!r} in MMoE")
            for task, gate in self.gates.items()
            if task in wanted
        }
        if self.training and self.gate_meter.gathering:
            for task, found in weights.items():
                self.gate_meter.add(task, found)
        return mix_for_each(weights, self.experts, x)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the experts' parameters; each gate serves one task."""
        return all_but_own(self)

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """Return the parameters of a task's gate."""
        return list(self.gates.get_submodule(task).parameters())

    def gate_statistics(self) -> dict[str, GateTable]:
        """Return each task's mean weights of the experts over the collected samples."""
        return {"gates": usage_of(self.gate_meter, self.tasks, self.num_experts)}


def usage_of(meter: GateMeter, tasks: Sequence[str], num_experts: int) -> GateTable:
    """Arrange collected gate weights in a table of tasks and experts."""
    blank = torch.full((num_experts,), torch.nan)
    rows = [blank if (mean := meter.mean(task)) is None else mean.cpu() for task in tasks]
    return GateTable(torch.stack(rows), tuple(tasks), tuple(str(expert) for expert in range(num_experts)))
