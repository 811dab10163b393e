"""Shared parameters are found here in a step's graphs, the same ones on all ranks, before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_mtl.devices import numbers, send
from lightning_mtl.gradients.graph import note_reach
from lightning_mtl.gradients.trunk import TrunkGradients
from lightning_mtl.task.module import TaskModule
from lightning_mtl.task.sharing import Sharing
from lightning_mtl.task.task import TaskOutput
from lightning_mtl.training.cast import Cast
from lightning_mtl.training.checks import nothing_shared
from lightning_mtl.training.window import Window


def find_shared(
    module: TaskModule, cast: Cast, window: Window, outputs: Mapping[str, TaskOutput], *, observed: bool
) -> None:
    """Look at the graphs of a micro-batch's losses, where it matters in this step what tasks share.

    One walk a task, and where several ranks train a sum of one number, until all parameters that train are shared.

    Args:
        module: What is trained; what it knows of sharing is written to.
        cast: Who takes part.
        window: The optimizer step.
        outputs: This rank's losses.
        observed: Whether a monitor measures gradients in this step.

    Raises:
        ValueError: If a weighting measures at shared parameters, all tasks were seen, and none are shared.
    """
    sharing = module.sharing
    # Heads that may come to train alone have to be known from what is shared before they do.
    observed |= cast.stopping is not None and cast.stopping.parts_heads
    needed = window.way != "losses" or window.size > 1 or observed or window.at_shared
    if sharing is None or window.repeats or not needed:
        return
    parameters: list[Tensor] = list(module.parameters())
    if not sharing.is_settled(parameters):
        before = sharing.size
        roots = {window.positions([task])[0]: output.loss for task, output in outputs.items()}
        sharing.seen.update(roots)
        note_reach(roots, set(parameters), sharing.owners, sharing.shared)
        if window.ranks.size > 1:
            _agree(sharing, window, parameters, news=sharing.size > before)
    shared = [p for p in parameters if p.requires_grad and p in sharing.shared]
    if isinstance(window.gradients, TrunkGradients):
        others = [p for p in parameters if p.requires_grad and p not in sharing.shared]
        window.gradients.share(shared, others)
    window.idle = not shared and window.at_shared
    if window.idle:
        window.keeps_rows = True  # of none: no layer can do without
        learned = module.tasks if module.learned_tasks is None else module.learned_tasks
        if 1 < len(learned) <= len(sharing.seen) and not cast.thaws:
            raise nothing_shared(window.weighting, list(module.tasks))


def _agree(sharing: Sharing, window: Window, parameters: Sequence[Tensor], *, news: bool) -> None:
    """Put together what the ranks know, if one of them has learned something."""
    device = parameters[0].device
    if window.ranks.sum(numbers([float(news)], device)):
        table = send(sharing.table(parameters, len(window.tasks)), device)
        sharing.take(window.ranks.sum(table), parameters)
