"""DSelect-k: shared experts, of which each task's gate selects a few by a smooth binary code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_mtl.architectures.experts import Experts, expert_group, flattened, mix_for_each
from lightning_mtl.architectures.mmoe import usage_of
from lightning_mtl.architectures.stages import all_but_own, checked_tasks, wanted_tasks
from lightning_mtl.monitors.gates import GateMeter, GateTable

# Keeps logarithm and inverse of a probability of 0, which the smooth step reaches, finite.
EPSILON = 1e-6


def smooth_step(t: Tensor, gamma: float = 1.0) -> Tensor:
    r"""Compute the cubic that is 0 up to −γ/2, 1 from γ/2 on, and has no kink.

    .. math:: S(t) = -\frac{2}{\gamma^3} t^3 + \frac{3}{2\gamma} t + \frac{1}{2}
        \quad \text{for} \quad |t| \le \gamma / 2

    Example:
        >>> smooth_step(torch.tensor([-0.6, 0.0, 0.25, 0.5]))
        tensor([0.0000, 0.5000, 0.8438, 1.0000])
    """
    t = t.clamp(-gamma / 2, gamma / 2)
    return -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5


class DSelectGate(nn.Module):
    r"""Weighs k single-expert selectors, each a code of ⌈log2 E⌉ smooth bits, by a softmax.

    .. math:: q = \sum_{i=1}^{k} \mathrm{softmax}(\alpha)_i \, r(z_i), \qquad
        r(z)_e = \prod_{b} S(z_b)^{[\text{bit } b \text{ of } e]} (1 - S(z_b))^{1 - [\text{bit } b \text{ of } e]}

    Args:
        num_experts: E.
        num_selected: k.
        gamma: The width of the smooth step.
        in_features: The number of features that α and z are linear in; None for parameters that are the same for all
            samples.
        who: The name of this part in errors.
    """

    codes: Tensor

    def __init__(self, num_experts: int, num_selected: int, gamma: float, in_features: int | None, who: str) -> None:
        super().__init__()
        self.num_selected, self.gamma, self.who = num_selected, gamma, who
        self.num_bits = math.ceil(math.log2(num_experts))
        bits = torch.arange(num_experts)[:, None] >> torch.arange(self.num_bits)
        self.register_buffer("codes", (bits & 1).bool(), persistent=False)
        # Where the paper's code starts: bits near 1/2, selectors of about the same weight.
        near = gamma / 100
        self.alpha: nn.Parameter | nn.Linear
        self.z: nn.Parameter | nn.Linear
        if in_features is None:
            self.alpha = nn.Parameter(torch.empty(num_selected).uniform_(-0.05, 0.05))
            self.z = nn.Parameter(torch.empty(num_selected, self.num_bits).uniform_(-near, near))
        else:
            self.alpha = nn.Linear(in_features, num_selected)
            self.z = nn.Linear(in_features, num_selected * self.num_bits)
            for layer, bound in ((self.alpha, 0.05), (self.z, near)):
                nn.init.uniform_(layer.weight, -bound, bound)
                nn.init.uniform_(layer.bias, -bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights q, ``[B, E]``, and the selectors r, ``[B, k, E]``; B is 1 where x plays no part."""
        if isinstance(self.alpha, nn.Linear) and isinstance(self.z, nn.Linear):
            flat = flattened(x, self.alpha.in_features, self.who)
            alpha, z = self.alpha(flat), self.z(flat).unflatten(1, (self.num_selected, self.num_bits))
        else:
            alpha, z = self.alpha.unsqueeze(0), self.z.unsqueeze(0)  # type: ignore[operator]  # both are parameters
        bits = smooth_step(z, self.gamma).unsqueeze(2)
        selectors = torch.where(self.codes, bits, 1 - bits).prod(3)
        return (alpha.softmax(1).unsqueeze(2) * selectors).sum(1), selectors


class DSelectK(nn.Module):
    r"""Mixes, for every task, at most k of the shared experts, which gradient descent chooses (DSelect-k).

    .. math:: z_k = \sum_e q_k(x)_e f_e(x)

    with the weights q of :class:`DSelectGate`. A bit whose logit leaves (−γ/2, γ/2) is exactly 0 or 1 and has no
    gradient: the choice is then made. Two terms, a mean over the samples and a sum over tasks and selectors, are added
    to the objective by :meth:`penalties`:

    - ``gate_entropy``: λ times the entropy of each selector's r, which drives it to a single expert;
    - ``gate_reachable``, unless E is a power of two: 1 / Σ_e r_e, which keeps a selector's code off the numbers that
      stand for no expert. It is 1 for each selector once all is well.

    Args:
        experts: As for :class:`MMoE`.
        tasks: The tasks' names, as the heads have them.
        num_selected: k, at most E.
        gate: The number of features of an input, for gates that depend on the sample; None for gates that depend on the
            task alone. Scale features to about 1, or bits are decided before training begins.
        num_experts: How many experts to make, with a function.
        gamma: γ, the width of the smooth step.
        entropy: λ, at least 0.

    Shapes: ``[B, ...]`` to ``{task: [B, ...]}``, each entry as one expert returns it.

    Raises:
        ValueError: If a number is out of range or contradicts another; in ``forward``, naming the expert or the gate,
            if shapes do not fit.
        TypeError: If an argument is of the wrong kind.

    Every expert is computed, selected or not. Penalties of gates that depend on the sample are those of the forward
    passes since they were last asked for, in training: a pass a task at most. The gate of a task that is absent from a
    step has no penalty in it, and stays where it is.

    Source: Hazimeh et al., DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to
    Multi-Task Learning, NeurIPS 2021, arXiv:2106.03760.

    Deviations: penalties are means over the samples, where the official code adds them up; λ does not depend on the
    size of a batch then. λ is constant. 1e-6 is added to Σ_e r_e, as to what a logarithm is taken of: a selector that
    has landed on a code without an expert does not make the objective infinite.

    Example:
        >>> trunk = DSelectK(lambda: nn.Linear(10, 4), ["a", "b"], num_selected=2, num_experts=6, entropy=0.1)
        >>> {task: list(z.shape) for task, z in trunk(torch.zeros(5, 10)).items()}
        {'a': [5, 4], 'b': [5, 4]}
        >>> sorted(trunk.penalties())
        ['gate_entropy', 'gate_reachable']
    """

    takes_tasks: ClassVar[bool] = True

    def __init__(
        self,
        experts: Experts,
        tasks: Sequence[str],
        *,
        num_selected: int = 2,
        gate: int | None = None,
        num_experts: int | None = None,
        gamma: float = 1.0,
        entropy: float = 1e-3,
    ) -> None:
        super().__init__()
        self.tasks = checked_tasks(tasks, "DSelectK")
        self.experts = expert_group(experts, num_experts, "DSelectK")
        self.num_experts, self.entropy, self.gate_meter = self.experts.num_experts, entropy, GateMeter()
        if self.num_experts < 2:
            raise ValueError("DSelectK has a single expert, of which there is nothing to select; give it two or more.")
        if not 1 <= num_selected <= self.num_experts:
            raise ValueError(
                f"DSelectK(num_selected={num_selected}) must be from 1 to the {self.num_experts} experts there are."
            )
        if gate is not None and gate < 1:
            raise ValueError(f"DSelectK(gate={gate}) must be the number of features of an input, at least 1, or None.")
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"DSelectK(gamma={gamma}) must be above 0 and finite.")
        if not (math.isfinite(entropy) and entropy >= 0):
            raise ValueError(f"DSelectK(entropy={entropy}) must be finite and at least 0.")
        self.depends_on_sample = gate is not None
        self.gates = nn.ModuleDict(
            {
                k: DSelectGate(self.num_experts, num_selected, gamma, gate, f"The gate of task {k!r} in DSelectK")
                for k in self.tasks
            }
        )
        self._selectors: list[dict[str, Tensor]] = []

    def __getstate__(self) -> dict[str, object]:
        # Selectors are parts of a graph, which can neither be copied nor saved.
        return self.__dict__ | {"_selectors": []}

    def forward(self, x: Tensor, *, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Mix the selected experts for each of ``tasks``, for all tasks where None."""
        wanted = wanted_tasks("DSelectK", self.tasks, tasks)
        # Gates first, so that the layer that runs last is one that all tasks share.
        found = {task: gate(x) for task, gate in self.gates.items() if task in wanted}
        weights = {task: q for task, (q, _) in found.items()}
        if self.training and self.gate_meter.gathering:
            for task, q in weights.items():
                self.gate_meter.add(task, q)
        if self.depends_on_sample and self.training and torch.is_grad_enabled():
            # Bounded, so that a training without penalties keeps no more than a few graphs alive. No deque: torch 2.6
            # cannot compile one.
            self._selectors = [*self._selectors, {task: r for task, (_, r) in found.items()}][-len(self.tasks) :]
        return mix_for_each(weights, self.experts, x)

    def penalties(self, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Compute the entropy and, unless E is a power of two, the reachability of the selectors.

        Args:
            tasks: The tasks of the step, whose gates alone are to be moved; None for all.
        """
        wanted = wanted_tasks("DSelectK", self.tasks, tasks)
        if self.depends_on_sample:
            passes, self._selectors = self._selectors, []
        else:
            nothing = next(self.experts.parameters()).new_zeros(1)
            passes = [{task: self.gates[task](nothing)[1] for task in wanted}]
        # A task with a loader of its own has passes of its own; [B, k, E] for each task.
        own = {task: [found[task] for found in passes if task in found] for task in wanted}
        each = [torch.cat(found) for found in own.values() if found]
        if not each:
            return {}
        entropies = [-(r * (r + EPSILON).log()).sum((1, 2)).mean() for r in each]
        terms = {"gate_entropy": self.entropy * torch.stack(entropies).sum()}
        if self.num_experts & (self.num_experts - 1):
            reachable = [(1 / (r.sum(2) + EPSILON)).sum(1).mean() for r in each]
            terms["gate_reachable"] = torch.stack(reachable).sum()
        return terms

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the experts' parameters; each gate serves one task."""
        return all_but_own(self)

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """Return the parameters of a task's gate."""
        return list(self.gates.get_submodule(task).parameters())

    def gate_statistics(self) -> dict[str, GateTable]:
        """Return each task's mean weights of the experts over the collected samples."""
        return {"gates": usage_of(self.gate_meter, self.tasks, self.num_experts)}
