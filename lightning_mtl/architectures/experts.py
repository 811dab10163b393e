"""Groups of experts that read the same input, and the gates that mix their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_mtl.architectures.stages import call

Experts: TypeAlias = Sequence[nn.Module] | Callable[[], nn.Module]
"""Modules, used as they are, or a function that makes one."""

ELEMENTWISE = frozenset(
    {
        *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
        *(nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity, nn.Dropout),
    }
)
"""Modules that do to a stack of experts what they do to each."""


def expert_group(experts: Experts, number: int | None, who: str) -> ExpertList | BatchedMLP:
    """Build a group of experts, which turns one input into ``[E, B, ...]``.

    Modules are taken as they are and run one after another. A function is called ``number`` times; if what it makes are
    plain MLPs, their parameters are stacked, ``[E, in, out]`` for a weight, and each layer is one operation.

    Args:
        experts: Modules, or a function that makes one.
        number: How many to make; for modules their number or None.
        who: The name of the group in errors.

    Raises:
        ValueError: If there is no expert, or the number contradicts the modules.
        TypeError: If something is no module.
    """
    # Stacked parameters against a loop over nn.Linear, forward and backward of two layers, one CPU thread: the time is
    # 0.14 to 0.52 of the loop's for width 32, 0.25 to 0.73 for 64, 0.5 to 0.84 for 128 and 0.75 to 1.01 for 256 (4, 8
    # and 16 experts, batches of 32 and 256; small batches and many experts gain most). So they are always stacked.
    # Stacking E separate modules' parameters in each step instead costs 0.4 to 1.4, torch.vmap over a functional call
    # 0.4 to 1.3, and one wide first layer for the input that all experts share more than a batched product.
    if isinstance(experts, nn.Module) and not isinstance(experts, nn.ModuleList):
        raise TypeError(
            f"The experts of {who} are a {type(experts).__name__}; give a list of modules or a function that makes one."
        )
    if callable(experts) and not isinstance(experts, nn.ModuleList):
        if number is None or number < 1:
            raise ValueError(f"{who} needs to know how many experts to make: at least 1, found {number}.")
        made = [experts() for _ in range(number)]
        _check_modules(made, who)
        return BatchedMLP.from_experts(made) or ExpertList(made, who)
    given = list(experts)
    _check_modules(given, who)
    if number is not None and number != len(given):
        raise ValueError(f"{who} was given {len(given)} experts, but their number as {number}; leave the number out.")
    return ExpertList(given, who)


def _check_modules(modules: Sequence[object], who: str) -> None:
    if not modules:
        raise ValueError(f"{who} was given no expert; one is the least.")
    for position, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise TypeError(f"Expert {position} of {who} must be a torch.nn.Module, found {type(module).__name__}.")


class ExpertList(nn.ModuleList):
    """Runs experts of any kind one after another; ``forward`` returns ``[E, B, ...]``."""

    def __init__(self, experts: Sequence[nn.Module], who: str) -> None:
        super().__init__(experts)
        self.who = who

    @property
    def num_experts(self) -> int:
        """Return E, the number of experts."""
        return len(self)

    def forward(self, x: Tensor) -> Tensor:
        """Apply every expert to ``x``.

        Raises:
            ValueError: If an expert cannot take ``x``, or two return different shapes.
        """
        outputs = [call(expert, x, f"Expert {position} of {self.who}") for position, expert in enumerate(self)]
        for position, output in enumerate(outputs):
            if output.shape != outputs[0].shape:
                raise ValueError(
                    f"Expert {position} of {self.who} returned shape {list(output.shape)} and expert 0 "
                    f"{list(outputs[0].shape)}; outputs that are mixed must have one shape."
                )
        return torch.stack(outputs)


class BatchedLinear(nn.Module):
    r"""Computes E linear layers at once: :math:`y_e = x_e W_e + b_e` for ``x`` of shape ``[E, N, in]``.

    The weights lie as ``[E, in, out]``, so that neither the product nor its gradient has to be transposed: for small
    batches that is a quarter of a step's time.

    Example:
        >>> layers = [nn.Linear(3, 2) for _ in range(4)]
        >>> BatchedLinear(layers)(torch.zeros(4, 5, 3)).shape
        torch.Size([4, 5, 2])
    """

    bias: nn.Parameter | None

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        trained = layers[0].weight.requires_grad
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]), trained)
        self.register_parameter("bias", None)
        if layers[0].bias is not None:
            self.bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in layers]), trained)

    def forward(self, x: Tensor) -> Tensor:
        """Apply layer e to ``x[e]``."""
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)

    def extra_repr(self) -> str:
        """Describe the layers as ``nn.Linear`` does one."""
        experts, inputs, outputs = self.weight.shape
        return f"experts={experts}, in_features={inputs}, out_features={outputs}, bias={self.bias is not None}"


class BatchedMLP(nn.Sequential):
    """Computes equal MLPs with stacked parameters, named as in one of them; returns ``[E, B, ..., out]``."""

    @classmethod
    def from_experts(cls, experts: Sequence[nn.Module]) -> BatchedMLP | None:
        """Stack experts, or return None if they are not equal chains of linear layers and activations."""
        found = _batch(experts)
        if found is None or not any(isinstance(module, BatchedLinear) for module in found.modules()):
            return None
        return cls(found)

    def __init__(self, stacked: nn.Module) -> None:
        super().__init__(*(stacked if isinstance(stacked, nn.Sequential) else [stacked]))
        first = next(module for module in self.modules() if isinstance(module, BatchedLinear))
        self.num_experts, self.in_features, _ = first.weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """Apply every expert to ``x``, whose last dimension holds the features.

        Raises:
            ValueError: If that dimension does not fit.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"Each expert's first layer takes {self.in_features} features, but its input has shape {list(x.shape)}."
            )
        y = (x if x.ndim == 2 else x.reshape(-1, self.in_features)).expand(self.num_experts, -1, -1)
        for layer in self:
            y = layer(y)
        return y if x.ndim == 2 else y.view(self.num_experts, *x.shape[:-1], y.shape[-1])


def _batch(modules: Sequence[nn.Module]) -> nn.Module | None:
    first = modules[0]
    if len(set(modules)) < len(modules) or any(repr(module) != repr(first) for module in modules):
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return None
    # Exactly these types: a subclass may do anything in its forward.
    if type(first) is nn.Sequential:
        layers = zip(*(module.children() for module in modules), strict=True)
        parts = [part for layer in layers if (part := _batch(layer)) is not None]
        return nn.Sequential(*parts) if len(parts) == len(first) else None
    if type(first) is nn.Linear:
        parameters = [parameter for module in modules for parameter in module.parameters()]
        kinds = {(p.requires_grad, p.dtype, p.device) for p in parameters}
        same = len(kinds) == 1 and len(set(parameters)) == len(parameters)
        return BatchedLinear([module for module in modules if isinstance(module, nn.Linear)]) if same else None
    return first if type(first) in ELEMENTWISE else None


def mix_experts(weights: Sequence[Tensor], outputs: Tensor) -> list[Tensor]:
    r"""Compute :math:`\sum_e w_{be} y_{eb}` for K sets of weights at once.

    Args:
        weights: K tensors ``[B, E]``, or ``[1, E]`` where all samples have the same.
        outputs: ``[E, B, ...]``.

    Returns:
        K tensors ``[B, ...]``.

    Example:
        >>> mix_experts([torch.tensor([[0.25, 0.75]])], torch.tensor([[[4.0]], [[8.0]]]))
        [tensor([[7.]])]
    """
    flat = outputs
    if outputs.ndim != 3:
        flat = outputs.flatten(2) if outputs.ndim > 3 else outputs.unsqueeze(2)
    # One product for all tasks takes a third of the time of an einsum a task.
    stacked = torch.stack(list(weights), 1)
    if stacked.shape[0] != outputs.shape[1]:
        stacked = stacked.expand(outputs.shape[1], -1, -1)
    mixed = torch.bmm(stacked.to(flat.dtype), flat.transpose(0, 1)).unbind(1)
    return list(mixed) if outputs.ndim == 3 else [one.view(outputs.shape[1:]) for one in mixed]


def mix_for_each(weights: Mapping[str, Tensor], experts: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Mix the outputs of the same experts by each task's weights; without a task nothing is computed."""
    if not weights:
        return {}
    return dict(zip(weights, mix_experts(list(weights.values()), experts(x)), strict=True))


Gate: TypeAlias = int | Callable[[int], nn.Module]
"""The number of features of a linear gate's input, or a function from a number of experts to a module of scores."""


def flattened(x: Tensor, in_features: int, who: str) -> Tensor:
    """Flatten all dimensions but the first, for a gate that is linear in all numbers of a sample.

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
    """Scores experts linearly in the flattened input, without a bias, as in the papers."""

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
