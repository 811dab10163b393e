"""Stacks of layers that a YAML file can construct."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn


class Layers(nn.Sequential):
    """Runs a list of modules one after the other: :class:`torch.nn.Sequential` for YAML, which has no ``*args``.

    Args:
        layers: The modules in order, one or more.

    Raises:
        ValueError: If there is no layer.

    Example:
        >>> import torch
        >>> Layers([nn.Linear(8, 4), nn.ReLU()])(torch.zeros(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, layers: list[nn.Module]) -> None:
        if not layers:
            raise ValueError("Layers(layers=[]) must hold a module or more.")
        super().__init__(*layers)


class MLP(nn.Sequential):
    """Runs linear layers with an activation after each: a multi-layer perceptron, the simplest trunk.

    Args:
        widths: Features of the input, of each hidden layer and of the output; two numbers or more.
        dropout: The share of activations dropped after each layer in training.
        activate_last: Whether the output, too, goes through the activation, as a trunk's should and a head's must not.

    Raises:
        ValueError: If there are fewer than two widths, one is below 1, or ``dropout`` is outside of [0, 1).

    Example:
        >>> import torch
        >>> MLP([8, 16, 4])(torch.zeros(2, 8)).shape
        torch.Size([2, 4])
    """

    def __init__(self, widths: Sequence[int], *, dropout: float = 0.0, activate_last: bool = True) -> None:
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"MLP(widths={list(widths)}) must be two numbers or more, each at least 1.")
        if not 0 <= dropout < 1:
            raise ValueError(f"MLP(dropout={dropout}) must be at least 0 and below 1.")
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        if not activate_last:
            layers = layers[: -2 if dropout else -1]
        super().__init__(*layers)
