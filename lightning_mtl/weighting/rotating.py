"""Rotating asks another method about gradients of which one is renewed in each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.devices import numbers, send, widest
from lightning_mtl.method.arguments import CommonArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Decision, Signals
from lightning_mtl.weighting.row_memory import in_one, without_scale
from lightning_mtl.weighting.wrapper import Wrapper


class Rotating(Wrapper):
    r"""Measure one task's gradient a step, in turns, and weigh by any method of norms or Gramians of those kept.

    .. math:: w(t) = f(G), \qquad G_{ij} = g_i(t_i) \cdot g_j(t_j), \qquad d(t) = \sum_k w_k(t) \, g_k(t)

    with f the wrapped method and :math:`t_k` the step in which task k was measured last: t for the task whose turn it
    is, the one measured longest ago, and at most K - 1 measuring steps earlier for the others where all tasks are
    present. What is old is G: each gradient in it belongs to the parameters and the batch of its own step. What is
    applied is not: the weights multiply the gradients of the present step, in one backward pass of the weighted losses.
    The first step measures all tasks; a task that comes later is measured in its first step. A method's guarantees,
    as not to conflict with any task, hold for the gradients in G.

    A step costs a plain step and one task's gradient, whatever K. That saves most where the tasks share a forward pass,
    of which a method in each step takes K gradients. Where each loss has points of its own, as in physics-informed
    networks, K gradients cost together what one backward pass does, and there is nothing to save.

    The gradients kept are K P numbers for P shared parameters, in checkpoints, too; ``grad_norm/<task>`` is not logged.
    With accumulated gradients all tasks' are kept until the step's end anyway, and nothing is saved. A sharded
    trunk (FSDP2) is refused.

    When: a method of Gramians helps, and a gradient of a deep trunk for each task in each step costs too much.

    Args:
        weighting: The method to ask, at ``"trunk"``, constructed without ``importance``, ``start_step`` and ``total``.
        **common: ``importance``, ``start_step`` and ``total``, as in :class:`~lightning_mtl.Weighting`.

    Raises:
        ValueError: If ``weighting`` measures elsewhere, or has an argument that belongs here.
        TypeError: If ``weighting`` reads neither norms nor a Gramian.

    Source: the rotation of M-ConFIG, Liu et al., ConFIG: Towards Conflict-free Training of Physics Informed Neural
    Networks, 2024, arXiv:2408.11104, section 3.3.

    Deviations: M-ConFIG passes one loss a step alone, and descends ConFIG's direction of running means of old
    gradients; here the weights meet the present gradients, so that they are what multiplies the losses, and moments
    are the optimizer's.

    Example:
        >>> from lightning_mtl.weighting import ConFIG
        >>> Rotating(ConFIG()).measures
        'gramian'
    """

    renews_rows = True

    def __init__(self, weighting: Weighting, **common: Unpack[CommonArguments]) -> None:
        super().__init__(weighting, **common)
        name = type(weighting).__name__
        if weighting.measures not in ("norms", "gramian"):
            raise TypeError(f"Rotating(weighting={name}(...)) has no gradients to renew: {name} measures none.")
        if weighting.at != "trunk":
            raise ValueError(
                f"Rotating(weighting={name}(at={weighting.at!r})) keeps gradients over the steps, which those of "
                f"shared parameters can be; use {name}(at='trunk')."
            )
        # Of all tasks, present or not: K x P numbers are not copied where one is absent.
        self.add_state("memory", torch.zeros(0, 0), per_task=False)
        self.add_state("products", torch.zeros(0, 0, dtype=torch.float64), per_task=False, on_cpu=True)
        self.add_state("renewed", torch.zeros(0, dtype=torch.long), per_task=False, on_cpu=True)
        self.memory: Tensor
        self.products: Tensor
        self.renewed: Tensor
        # The step, the measured tasks among all, their gradients, and the products of all.
        self._coming: tuple[int, list[int], Tensor, Tensor] | None = None

    def to_renew(self, tasks: Sequence[str], size: int) -> list[int]:
        """Choose the tasks without a gradient of this size, or else the one measured longest ago."""
        places = [self.tasks.index(task) for task in tasks]
        if self.memory.shape != (len(self.tasks), size):
            return list(range(len(tasks)))
        steps = self.renewed[places].tolist()
        unknown = [position for position, step in enumerate(steps) if step < 0]
        return unknown or [steps.index(min(steps))]

    def decide(
        self, signals: Signals, present: Sequence[int], *, measured: bool, rows: Sequence[Tensor] = ()
    ) -> Decision:
        """Put the new gradients among the old ones, and ask the method."""
        if not rows:
            return super().decide(signals, present, measured=measured)
        given = in_one(rows)
        chosen = self.to_renew(signals.tasks, given.shape[1])
        if signals.norms is not None:  # of all tasks' gradients, under accumulation
            given = without_scale(given, signals.norms)[0][numbers(chosen, given.device, torch.long)]
        places = [present[position] for position in chosen]
        products = self._products_with(places, given)
        if not bool(torch.isfinite(products).all()):  # on the host; the step will be skipped
            ones = torch.ones_like(signals.losses)
            return Decision(ones, None if self.weighs_heads else ones)
        self._coming = signals.step, places, given, products
        return super().decide(self._seen(signals, present, products), present, measured=measured)

    def weigh(self, signals: Signals) -> Tensor:
        """Ask the wrapped method."""
        return self.newest(signals)

    def observe(self, signals: Signals, present: Sequence[int]) -> None:
        """Keep the new gradients, and let the wrapped method update its state."""
        if self._coming is not None and self._coming[0] == signals.step:
            _, places, given, products = self._coming
            if self.memory.shape != (len(self.tasks), given.shape[1]):
                self.memory = given.new_zeros(len(self.tasks), given.shape[1])
                self.renewed = torch.full((len(self.tasks),), -1)
            for place, row in zip(places, given, strict=True):
                self.memory[place] = row
            self.renewed[places] = signals.step
            self.products = products
            signals = self._seen(signals, present, products)
        self._coming = None
        super().observe(signals, present)

    def _products_with(self, places: Sequence[int], given: Tensor) -> Tensor:
        """The inner products of all tasks' gradients, ``[K, K]``, with new ones in these places."""
        memory: list[Tensor | None] = [None] * len(self.tasks)
        products = torch.zeros(len(self.tasks), len(self.tasks), dtype=torch.float64)
        if self.memory.shape == (len(self.tasks), given.shape[1]):
            memory, products = list(self.memory.unbind()), self.products.clone()
        for place, row in zip(places, given, strict=True):
            memory[place] = row
        known = [place for place, one in enumerate(memory) if one is not None]
        wide = widest(given.device)  # solvers see small differences between large products
        rows = [one for one in memory if one is not None]
        found = torch.stack([torch.stack([(row * one.to(row)).sum() for one in rows]) for row in given.to(wide)])
        for place, own in zip(places, found.cpu().double(), strict=True):  # one wait for a device
            products[place, known] = products[known, place] = own
        return products

    def _seen(self, signals: Signals, present: Sequence[int], products: Tensor) -> Signals:
        """What the wrapped method is told of the gradients."""
        G = products[list(present)][:, list(present)]
        norms = send(G.diagonal().sqrt(), signals.losses.device, signals.losses.dtype)
        gramian = G if self.measures == "gramian" else None
        return replace(signals, gramian=gramian, norms=norms, host_norms=G.diagonal().sqrt())
