"""What ``torch.compile`` has made one operation of, where its graph is passed more than once."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from torch import Tensor
from torch._functorch import config
from torch.autograd.graph import Node

# Made once: making it takes five times as long as entering it.
_WITHOUT_DONATION: AbstractContextManager[None] = config.patch(donated_buffer=False)


def keeping_buffers() -> AbstractContextManager[None]:
    """Have what is compiled inside the block keep, in a backward pass, what another pass will need.

    By default PyTorch lets the first pass through a compiled part write over the activations.
    """
    return _WITHOUT_DONATION


def check_repeatable(roots: Iterable[Tensor]) -> None:
    """Refuse a graph with a part that was compiled for one backward pass alone, in an earlier training for instance.

    Raises:
        ValueError: Saying how to have it compiled again.
    """
    seen: set[Node] = set()
    stack = [root.grad_fn for root in roots]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        # An operation written in Python has such a class; a user's own donates nothing.
        compiled = getattr(node, "_forward_cls", None)
        if getattr(getattr(compiled, "metadata", None), "bw_donated_idxs", None):
            raise ValueError(
                "A part of the model was compiled, before this training, for a single backward pass, but its tasks' "
                "gradients are computed one after another. Call torch.compiler.reset() before the training, so that it "
                "is compiled again."
            )
        stack += [child for child, _ in node.next_functions]
