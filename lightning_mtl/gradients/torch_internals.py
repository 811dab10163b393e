"""All private parts of torch that the engine needs are called here."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch._functorch import config
from torch.autograd.graph import Node
from torch.distributed.fsdp import FSDPModule

# Missing in some future torch, they only cost speed: the engine then takes its general form.
_will_execute = getattr(torch._C, "_will_engine_execute_node", None)
_is_functorch_wrapped = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)

CAN_ASK_ENGINE = _will_execute is not None
"""Whether torch can say, inside a backward pass, which nodes the pass is going to run."""


def will_execute(nodes: Iterable[Node]) -> bool:
    """Whether the backward pass under way is going to run one of these nodes; asked from within one of its hooks."""
    return _will_execute is None or any(_will_execute(node) for node in nodes)


def is_functorch_wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a ``torch.func`` transform, whose graph is not autograd's own."""
    return _is_functorch_wrapped is not None and bool(_is_functorch_wrapped(tensor))


def _accumulator_type() -> type[Node]:
    node = torch.zeros((), requires_grad=True).neg().grad_fn
    return type(node.next_functions[0][0])  # type: ignore[union-attr, return-value]  # the tensor above has a graph


ACCUMULATE_GRAD = _accumulator_type()
"""The type of the nodes at which a graph ends: one a leaf, as its attribute ``variable``."""

_one = torch.zeros(1, 1, requires_grad=True)
TRANSPOSE, CAST = type(_one.t().grad_fn), type(_one.double().grad_fn)
"""The types of the nodes between a weight and the layer that uses it: ``weight.t()``, and autocast's copy of it."""

# The layers whose input is read, and the name under which their nodes keep it.
_INPUTS = {
    "AddmmBackward0": "mat1",
    "MmBackward0": "self",
    "ConvolutionBackward0": "input",
    "EmbeddingBackward0": "indices",
    "EmbeddingBagBackward0": "indices",
}


def saved_plainly(node: Node) -> bool:
    """Whether a layer's input is kept as it is, no hook being asked for it.

    Such hooks fetch it from elsewhere, or compute it again as checkpoints do: twice, if it is read beside the backward
    pass. A torch that cannot say counts as one with hooks.
    """
    saved = getattr(node, f"_raw_saved_{_INPUTS[type(node).__name__]}", None)
    if getattr(saved, "unpack_hook", saved_plainly) is not None:
        return False
    data = saved.data  # type: ignore[union-attr]
    return type(data) in (Tensor, torch.nn.Parameter) and data.layout is torch.strided


def saved_input(node: Node) -> Tensor:
    """A layer's input, as the backward pass reads it.

    Raises:
        RuntimeError: As that pass does, if it was written into meanwhile.
    """
    found: Tensor = getattr(node, f"_saved_{_INPUTS[type(node).__name__]}")
    return found.detach()


def forward_order(node: Node) -> int:
    """The number of a node in the order in which operations ran forward, on one thread."""
    return int(node._sequence_nr())


def times_written(tensor: Tensor) -> int:
    """How often a tensor's memory was written into, counted over all tensors that share it."""
    return int(tensor._version)


def owner_of_memory(tensor: Tensor) -> Tensor:
    """The tensor that a view is a view of, where autograd follows it; other tensors themselves."""
    base = tensor._base
    return tensor if base is None or not base.requires_grad else base


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether something acts on the tensor's gradient, or keeps it."""
    return bool(tensor._backward_hooks) or tensor.retains_grad


hooks_of = operator.attrgetter("_backward_hooks")
"""What acts on a tensor's gradient; a function of C, so that a step without hooks pays next to nothing for asking."""


@contextmanager
def parameter_hooks_off(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Keep gradient hooks of parameters for the one backward pass that makes the final gradient.

    ``torch.autograd.grad`` calls a parameter's hooks for every gradient that it returns. The hooks are taken out of the
    dictionary that holds them and put back, so that handles to them stay valid.
    """
    held = [(hooks, dict(hooks)) for parameter in parameters if (hooks := parameter._backward_hooks)]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


# Made once: making it takes five times as long as entering it.
KEEPING_BUFFERS: AbstractContextManager[None] = config.patch(donated_buffer=False)
"""Has what is compiled inside the block keep, in a backward pass, what another pass will need; by default the first
pass through a compiled part writes over its activations."""


def is_python_function(node: object) -> bool:
    """Whether a node is an ``autograd.Function`` written in Python."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def donates_buffers(node: Node) -> bool:
    """Whether a node is a compiled part that can be passed backward only once."""
    # An operation written in Python has such a class; a user's own donates nothing.
    compiled = getattr(node, "_forward_cls", None)
    return bool(getattr(getattr(compiled, "metadata", None), "bw_donated_idxs", None))


def reduces_in_another_dtype(part: FSDPModule) -> bool:
    """Whether FSDP2 sums this part's gradients in a dtype that they do not have."""
    policy = part._get_fsdp_state()._mp_policy
    return policy.reduce_dtype not in (None, policy.param_dtype)
