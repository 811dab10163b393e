"""Gates: what decides, for each sample, how much of each expert a task takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from lightning_mtl.architectures.shapes import call

Gate: TypeAlias = int | Callable[[int], nn.Module]
"""The number of features of a linear gate's input, or a function from a number of experts to a module of scores."""


def flattened(x: Tensor, in_features: int, who: str) -> Tensor:
    """Flatten all dimensions but the first, for a gate that is linear in what there is of a sample.

    Raises:
        ValueError: If ``x`` has another number of features.
    """
    flat = x.flatten(1)
    if flat.shape[1] != in_features:
        raise ValueError(
            f"{who} was built for {in_features} numbers a sample, but its input has shape {list(x.shape)}; pass "
            f"gate={flat.shape[1]}."
        )
    return flat


class LinearGate(nn.Linear):
    """Scores linear in the input, all dimensions but the first flattened; without a bias, as in the papers."""

    def __init__(self, in_features: int, num_experts: int, who: str) -> None:
        super().__init__(in_features, num_experts, bias=False)
        self.who = who

    def forward(self, x: Tensor) -> Tensor:
        """Score each expert for each sample, ``[B, E]``.

        Raises:
            ValueError: If ``x`` has another number of features.
        """
        return super().forward(flattened(x, self.in_features, self.who))


def build_gate(gate: Gate, num_experts: int, who: str) -> nn.Module:
    """Build a module that scores ``num_experts`` experts.

    Raises:
        ValueError: If the number of features is not positive.
        TypeError: If ``gate`` is neither a number nor a function that makes a module.
    """
    if isinstance(gate, int) and not isinstance(gate, bool):
        if gate < 1:
            raise ValueError(f"{who}: gate={gate} must be the number of features of the gate's input, at least 1.")
        return LinearGate(gate, num_experts, who)
    if isinstance(gate, nn.Module) or not callable(gate):
        raise TypeError(
            f"{who}: gate must be a number of features or a function from a number of experts to a module, found "
            f"{type(gate).__name__}; each task needs a gate of its own."
        )
    made = gate(num_experts)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{who}: gate({num_experts}) must return a torch.nn.Module, found {type(made).__name__}.")
    return made


def gate_weights(gate: nn.Module, x: Tensor, num_experts: int, who: str) -> Tensor:
    """Take the softmax of a gate's scores, ``[B, E]``.

    Raises:
        ValueError: If the scores have another shape.
    """
    scores = gate(x) if isinstance(gate, LinearGate) else call(gate, x, who)
    if scores.shape != (x.shape[0], num_experts):
        raise ValueError(
            f"{who} returned shape {list(scores.shape)}; {num_experts} experts and {x.shape[0]} samples need "
            f"[{x.shape[0]}, {num_experts}]."
        )
    return scores.softmax(1)
