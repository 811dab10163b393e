"""PLE and CGC: experts of each task and shared experts, in several levels or in one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from lightning_mtl.architectures.experts import Gate, build_gate, expert_group, gate_weights, mix_experts
from lightning_mtl.architectures.stages import all_but_own, checked_tasks, wanted_tasks
from lightning_mtl.monitors.gates import GateMeter, GateTable

SHARED = "shared"
LevelExperts: TypeAlias = Callable[[], nn.Module] | Mapping[str, Sequence[nn.Module]]
"""A function that makes an expert; or lists of modules by task, and by ``"shared"``."""


class Extraction(nn.Module):
    r"""Computes one level: each stream mixes its own experts and the shared ones, the shared stream all experts.

    .. math:: z_k = g_k(x_k) \cdot [F_k(x_k); F_s(x_s)], \qquad
        z_s = g_s(x_s) \cdot [F_1(x_1); \dots; F_K(x_K); F_s(x_s)]

    Args:
        experts: A function, or lists of modules by task and by ``"shared"``.
        tasks: The tasks' names.
        gate: As in :class:`~lightning_mtl.architectures.MMoE`.
        task_experts: How many experts a task to make, with a function.
        shared_experts: How many shared experts to make, with a function.
        last: Whether this is the last level, where the shared stream ends.
        who: The name of the level in errors.
        meter: Collects the gates of all levels.
    """

    def __init__(
        self,
        experts: LevelExperts,
        tasks: tuple[str, ...],
        gate: Gate,
        task_experts: int,
        shared_experts: int,
        *,
        last: bool,
        who: str,
        meter: GateMeter,
    ) -> None:
        super().__init__()
        self.tasks, self.who = tasks, who
        streams = (*tasks, SHARED)
        if isinstance(experts, Mapping):
            if experts.keys() != set(streams):
                raise ValueError(
                    f"The experts of {who} are given for {sorted(experts)}; lists for {sorted(streams)} are needed."
                )
            groups = {k: expert_group(experts[k], None, f"{who} for {k!r}") for k in streams}
            self.numbers = {k: len(experts[k]) for k in streams}
        else:
            self.numbers = dict.fromkeys(tasks, task_experts) | {SHARED: shared_experts}
            groups = {k: expert_group(experts, self.numbers[k], f"{who} for {k!r}") for k in streams}
        # The shared experts come last, so that the layer that runs last is one that all tasks share.
        self.experts = nn.ModuleDict(groups)
        self.gates = nn.ModuleDict(
            {k: build_gate(gate, self.choices(k), self._gate_name(k)) for k in (tasks if last else streams)}
        )
        self.gate_meter = meter

    def choices(self, stream: str) -> int:
        """Return the number of experts that a stream's gate mixes."""
        return sum(self.numbers.values()) if stream == SHARED else self.numbers[stream] + self.numbers[SHARED]

    def _gate_name(self, stream: str) -> str:
        return f"The gate for {stream!r} in {self.who}"

    def read_by(self, wanted: Collection[str]) -> Collection[str]:
        """Return the streams that this level reads to compute those that are wanted."""
        return self.numbers if SHARED in wanted else {*wanted, SHARED}

    def forward(self, streams: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
        """Compute those streams for the next level, of tasks or the shared one, that are wanted."""
        weights = {
            stream: gate_weights(gate, streams[stream], self.choices(stream), self._gate_name(stream))
            for stream, gate in self.gates.items()
            if stream in wanted
        }
        if self.training and self.gate_meter.gathering:
            for stream, found in weights.items():
                self.gate_meter.add(self._gate_name(stream), found)
        read = self.read_by(wanted)
        outputs = {stream: group(streams[stream]) for stream, group in self.experts.items() if stream in read}
        self._check(outputs)
        mixed = {}
        for stream, found in weights.items():
            mine = outputs.values() if stream == SHARED else (outputs[stream], outputs[SHARED])
            (mixed[stream],) = mix_experts([found], torch.cat(list(mine)))
        return mixed

    def _check(self, outputs: Mapping[str, Tensor]) -> None:
        expected = outputs[SHARED].shape[1:]
        for stream, output in outputs.items():
            if output.shape[1:] != expected:
                raise ValueError(
                    f"In {self.who} the experts for {stream!r} returned shape {list(output.shape[1:])} and the shared "
                    f"ones {list(expected)}; outputs that are mixed must have one shape."
                )

    def usage(self) -> GateTable:
        """Return each stream's mean weights of the experts over the collected samples."""
        columns = [f"{stream} {i}" for stream, number in self.numbers.items() for i in range(number)]
        table = torch.full((len(self.gates), len(columns)), torch.nan)
        starts = {k: columns.index(f"{k} 0") for k in self.numbers}
        for row, stream in enumerate(self.gates):
            mean = self.gate_meter.mean(self._gate_name(stream))
            if mean is None:
                continue
            if stream == SHARED:
                table[row] = mean.cpu()
            else:
                own = self.numbers[stream]
                table[row, starts[stream] : starts[stream] + own] = mean[:own].cpu()
                table[row, starts[SHARED] :] = mean[own:].cpu()
        return GateTable(table, tuple(self.gates), tuple(columns))


class PLE(nn.Module):
    r"""Mixes task and shared experts level by level, with a stream for each task and a shared one (PLE).

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

    takes_tasks: ClassVar[bool] = True

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
        self.tasks = checked_tasks(tasks, who)
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

    def forward(self, x: Tensor, *, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Pass the input through all levels, as far as ``tasks`` need them, all tasks where None."""
        wanted = wanted_tasks(type(self).__name__, self.tasks, tasks)
        if not wanted:
            return {}
        needed: list[Collection[str]] = [wanted]
        for level in self._extractions[:0:-1]:
            needed.insert(0, level.read_by(needed[0]))
        streams = dict.fromkeys((*self.tasks, SHARED), x)
        for level, streams_after in zip(self._extractions, needed, strict=True):
            streams = level(streams, streams_after)
        return streams

    @property
    def _extractions(self) -> list[Extraction]:
        return list(self.levels)  # type: ignore[arg-type]  # they are what __init__ makes

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return all parameters that more than one task reaches."""
        return all_but_own(self)

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """Return what a single task reaches: its last experts and gate, and its gate in the level before."""
        own = [self.levels[-1].get_submodule(f"{part}.{task}") for part in ("experts", "gates")]
        own += [level.get_submodule(f"gates.{task}") for level in self._extractions[-2:-1]]
        return [parameter for module in own for parameter in module.parameters()]

    def gate_statistics(self) -> dict[str, GateTable]:
        """Return each stream's mean weights of the experts over the collected samples, a table for each level."""
        levels = self._extractions
        single = len(levels) == 1
        return {"gates" if single else f"gates_{i}": level.usage() for i, level in enumerate(levels, 1)}


class CGC(PLE):
    r"""Mixes, for each task, experts of its own with experts that all tasks share (customized gate control).

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
