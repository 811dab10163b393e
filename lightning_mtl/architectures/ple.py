"""Experts of each task and shared ones, in one level or several."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_mtl.architectures.extraction import SHARED, Extraction, LevelExperts
from lightning_mtl.architectures.gates import Gate
from lightning_mtl.architectures.shapes import check_tasks
from lightning_mtl.monitors.gate_statistics import GateMeter, GateTable


class PLE(nn.Module):
    r"""Progressive layered extraction: task and shared experts in levels, with a stream for each task and a shared one.

    .. math:: z_k^{j} = g_k^{j}(z_k^{j-1}) \cdot [F_k^{j}(z_k^{j-1}); F_s^{j}(z_s^{j-1})], \qquad
        z_s^{j} = g_s^{j}(z_s^{j-1}) \cdot [F_1^{j}(z_1^{j-1}); \dots; F_K^{j}(z_K^{j-1}); F_s^{j}(z_s^{j-1})]

    where :math:`z^0 = x`, each F holds the outputs of a stream's experts, and each g is the softmax of a gate's scores.
    The last level has no shared gate. With one level it is :class:`CGC`.

    Args:
        experts: A level each: a function that makes an expert, or lists of modules by task and by ``"shared"``, as
            ``{"a": [...], "b": [...], "shared": [...]}``. Equal MLPs from a function are computed together, with
            parameters ``[E, ...]`` named as in one of them.
        tasks: The tasks' names, as the heads have them.
        gates: A level each: the number of features of the level's input, for a linear gate that flattens it; or a
            function from the number of experts to a module that scores them.
        task_experts: How many experts to make for each task, with a function.
        shared_experts: How many shared experts to make, with a function.

    Shapes: ``[B, ...]`` to ``{task: [B, ...]}``, each entry as an expert of the last level returns it.

    Raises:
        ValueError: If a number is out of range, levels and gates differ in number, or a task is called ``"shared"``; in
            ``forward``, naming level, stream and expert, if shapes do not fit.
        TypeError: If an argument is of the wrong kind.

    Each task has an output of its own, so that ``at="features"`` finds gradients that never conflict; measure at the
    trunk. :meth:`shared_parameters` leaves out what a single task reaches: its experts and gate in the last level, and
    its gate in the one before.

    Source: Tang et al., Progressive Layered Extraction (PLE): A Novel Multi-Task Learning (MTL) Model for Personalized
    Recommendations, RecSys 2020.

    Example:
        >>> import torch
        >>> levels = [lambda: nn.Sequential(nn.Linear(10, 8), nn.ReLU()), lambda: nn.Linear(8, 4)]
        >>> trunk = PLE(levels, ["a", "b"], gates=[10, 8], task_experts=2, shared_experts=1)
        >>> {task: list(z.shape) for task, z in trunk(torch.zeros(5, 10)).items()}
        {'a': [5, 4], 'b': [5, 4]}
    """

    def __init__(
        self,
        experts: Sequence[LevelExperts],
        tasks: Sequence[str],
        gates: Sequence[Gate],
        *,
        task_experts: int = 1,
        shared_experts: int = 1,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.tasks = check_tasks(tasks, who)
        if SHARED in self.tasks:
            raise ValueError(f"{who}(tasks=...) has a task {SHARED!r}, the name of the shared stream; rename the task.")
        if not experts or len(experts) != len(gates):
            raise ValueError(f"{who} takes experts and a gate for each level, found {len(experts)} and {len(gates)}.")
        self.gate_meter = GateMeter()
        self.levels = nn.ModuleList(
            Extraction(
                level,
                self.tasks,
                gate,
                task_experts,
                shared_experts,
                last=number == len(experts),
                who=f"level {number} of {who}" if len(experts) > 1 else who,
                meter=self.gate_meter,
            )
            for number, (level, gate) in enumerate(zip(experts, gates, strict=True), 1)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Pass the input through all levels."""
        streams = dict.fromkeys((*self.tasks, SHARED), x)
        for level in self.levels:
            streams = level(streams)
        return streams

    def shared_parameters(self) -> list[nn.Parameter]:
        """All parameters that more than one task reaches."""
        own = [self.levels[-1].get_submodule(f"{part}.{k}") for part in ("experts", "gates") for k in self.tasks]
        if len(self.levels) > 1:
            own += [self.levels[-2].get_submodule(f"gates.{k}") for k in self.tasks]
        theirs = {parameter for module in own for parameter in module.parameters()}
        return [parameter for parameter in self.parameters() if parameter not in theirs]

    def gate_statistics(self) -> dict[str, GateTable]:
        """How much each stream takes of each expert, a table a level: the mean over the samples gathered."""
        levels = [level for level in self.levels if isinstance(level, Extraction)]
        single = len(levels) == 1
        return {"gates" if single else f"gates_{i}": level.usage() for i, level in enumerate(levels, 1)}
