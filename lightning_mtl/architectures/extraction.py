"""One level of progressive layered extraction: experts of each task, shared experts, and the gates between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_mtl.architectures.experts import expert_group, mix_experts
from lightning_mtl.architectures.gates import Gate, build_gate, gate_weights
from lightning_mtl.monitors.gate_statistics import GateMeter, GateTable

SHARED = "shared"
LevelExperts: TypeAlias = Callable[[], nn.Module] | Mapping[str, Sequence[nn.Module]]
"""A function that makes an expert; or lists of modules by task, and by ``"shared"``."""


class Extraction(nn.Module):
    r"""One level: each stream is a gated sum of its own experts and the shared ones; the shared stream of all.

    .. math:: z_k = g_k(x_k) \cdot [F_k(x_k); F_s(x_s)], \qquad
        z_s = g_s(x_s) \cdot [F_1(x_1); \dots; F_K(x_K); F_s(x_s)]

    Args:
        experts: A function, or lists of modules by task and by ``"shared"``.
        tasks: The tasks' names.
        gate: As in :class:`~lightning_mtl.architectures.MMoE`.
        task_experts: How many experts a task to make, with a function.
        shared_experts: How many shared experts to make, with a function.
        last: Whether no level follows, and the shared stream ends here.
        who: Whom errors are to name.
        meter: What gathers the gates of all levels.
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
        """How many experts a stream's gate chooses among."""
        return sum(self.numbers.values()) if stream == SHARED else self.numbers[stream] + self.numbers[SHARED]

    def _gate_name(self, stream: str) -> str:
        return f"The gate for {stream!r} in {self.who}"

    def forward(self, streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn the streams of all tasks and the shared one into those of the next level."""
        weights = {
            stream: gate_weights(gate, streams[stream], self.choices(stream), self._gate_name(stream))
            for stream, gate in self.gates.items()
        }
        if self.training and self.gate_meter.gathering:
            for stream, found in weights.items():
                self.gate_meter.add(self._gate_name(stream), found)
        outputs = {stream: group(streams[stream]) for stream, group in self.experts.items()}
        self._check(outputs)
        mixed = {}
        for stream, found in weights.items():
            read = outputs.values() if stream == SHARED else (outputs[stream], outputs[SHARED])
            (mixed[stream],) = mix_experts([found], torch.cat(list(read)))
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
        """How much each stream takes of each expert, the mean over the samples gathered."""
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
