"""One backward pass through all heads tells the tasks' gradients at the trunk's outputs apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

from lightning_mtl.gradients.graph import Above
from lightning_mtl.gradients.micro_batch import MicroBatch
from lightning_mtl.gradients.split import Output
from lightning_mtl.gradients.torch_internals import will_execute


class EntersTrunkError(Exception):
    """The pass would have run into the trunk; it has stopped before its first kernel, and nothing was freed."""


def one_pass(
    batch: MicroBatch,
    above: Sequence[Above],
    read: Sequence[Output],
    below: Sequence[Node],
) -> tuple[list[list[Tensor | None]], list[dict[Tensor, Tensor]]]:
    """Differentiate all losses at once, where they share nothing above the split.

    Each operation that reads an output of the trunk belongs to one task. A hook on it takes what it sends to the
    output, and hands autograd nothing in its place, so that no sum over the tasks is built.

    Args:
        batch: The losses.
        above: For each loss, what it reaches above the split.
        read: The outputs of the trunk to differentiate by.
        below: The trunk's nodes next to its outputs, which must not run.

    Returns:
        For each task, dL_k/dz for each output that is read, and the gradients of the leaves above the split.

    Raises:
        EntersTrunkError: If a leaf is reached through the trunk as well, as where weights are tied or calls are nested.
    """
    cotangents: list[list[Tensor | None]] = [[None] * len(read) for _ in above]
    position = {batch.split.stops[output.key]: place for place, output in enumerate(read)}
    leaves = [leaf for index in batch.with_graph for leaf in above[index].leaves]
    handles = [
        node.register_hook(_recorder(cotangents[index], places, position))
        for index in batch.with_graph
        for node, places in above[index].readers.items()
    ]
    asked = False

    def ask(_: Any) -> None:  # noqa: ANN401 - a node's gradients
        nonlocal asked
        if not asked and will_execute(below):
            raise EntersTrunkError
        asked = True

    try:
        # Autograd says which nodes it will run only once a pass has begun: so the first node of each loss asks.
        handles += [batch.losses[index].grad_fn.register_prehook(ask) for index in batch.with_graph]  # type: ignore[union-attr]
        # A penalty's graph may be a part of the losses', and runs in the final backward pass.
        found = batch.all_gradients([*(o.edge for o in read), *leaves], retain_graph=batch.penalty is not None)
    finally:
        for handle in handles:
            handle.remove()
    # The gradients of the leaves come back in the order in which they were asked for, task after task.
    remaining = iter(found[len(read) :])
    own: list[dict[Tensor, Tensor]] = [{} for _ in above]
    for index in batch.with_graph:
        for leaf in above[index].leaves:
            if (gradient := next(remaining)) is not None:
                own[index][leaf] = gradient
    return cotangents, own


def _recorder(
    cotangents: list[Tensor | None], places: Sequence[tuple[int, int]], position: Mapping[int, int]
) -> Callable[..., Any]:
    def record(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        rest = list(gradients)
        for slot, index in places:
            if (gradient := rest[slot]) is not None:
                before = cotangents[position[index]]
                cotangents[position[index]] = gradient if before is None else before + gradient
                # What is kept is not passed on: the outputs' sum over the tasks would cost memory and tell nothing.
                rest[slot] = None
        return tuple(rest)

    return record
