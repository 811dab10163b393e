"""The base of methods that keep a number for each task and shared parameter over the steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_mtl.devices import send
from lightning_mtl.method.arguments import GradientArguments
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Decision, Signals


class RowMemory(Weighting):
    """Keeps ``memory``, ``[K, P]`` for P shared parameters, where :attr:`measures` is ``"rows"``.

    Args:
        **common: ``importance``, ``start_step``, ``total``, ``at``, ``every_n_steps`` and ``gradients``, as in
            :class:`~lightning_mtl.Weighting`; rows are those ``at="trunk"``, and of every step.

    Raises:
        ValueError: If rows are asked for at another place, or not in each step.
    """

    def __init__(self, **common: Unpack[GradientArguments]) -> None:
        super().__init__(**common)
        self.memory: Tensor
        if self.measures != "rows":
            return
        name = type(self).__name__
        if self.at != "trunk":
            raise ValueError(
                f"{name}(at={self.at!r}) keeps a number for each task and shared parameter over the steps, whose "
                "gradients are rows at the trunk alone: those at the features belong to one batch's samples. Use "
                "at='trunk'."
            )
        if self.every_n_steps > 1:
            raise ValueError(
                f"{name}(every_n_steps={self.every_n_steps}) adds each step's gradients to what it keeps; use "
                "every_n_steps=1."
            )
        self.add_state("memory", torch.zeros(0))

    def decide(
        self, signals: Signals, present: Sequence[int], *, measured: bool, rows: Sequence[Tensor] = ()
    ) -> Decision:
        """Bring the rows into one matrix of the losses' own gradients, and the memory to its width."""
        if not rows or signals.norms is None:
            return super().decide(signals, present, measured=measured)
        dtype = torch.float32
        for block in rows:
            dtype = torch.promote_types(dtype, block.dtype)
        home = rows[0].device  # of blocks that may lie on several
        whole = torch.cat([block.to(home, dtype) for block in rows], dim=1) if len(rows) > 1 else rows[0].to(dtype)
        if self.memory.shape[1] not in (0, whole.shape[1]):
            raise ValueError(
                f"{type(self).__name__} keeps a number for each task and shared parameter, of which there were "
                f"{self.memory.shape[1]} and are {whole.shape[1]} at step {signals.step}; have the same ones train "
                "from its start_step= on, name them by shared_parameters(), or use a method without such a memory."
            )
        if self.memory.shape[1] != whole.shape[1]:
            self.memory = whole.new_zeros(len(self.tasks), whole.shape[1])
        # Rows still have a gradient scaler's factor, which changes from step to step; norms have not.
        norms, lengths = send(signals.norms, home, dtype).sum(), torch.linalg.vector_norm(whole, dim=1).sum()
        scale = torch.where(norms > 0, lengths / norms, torch.ones_like(norms))
        if abs(float(scale) - 1) < 1e-3:  # no scaler: rounding
            scale = torch.ones_like(scale)
        else:
            whole = whole / scale
        with self._cut_to(present):
            decision = self.decide_by(signals, whole)
        if decision.directions is not None:
            whole_direction = decision.directions[0] * scale
            parts = whole_direction.split([block.shape[1] for block in rows])
            decision.directions = [part.to(block) for part, block in zip(parts, rows, strict=True)]
        return decision

    def decide_by(self, signals: Signals, rows: Tensor) -> Decision:
        """Weigh by the rows, ``[K, P]``; a direction, if that is what comes out, is in one piece."""
        raise NotImplementedError(f"{type(self).__name__} has to implement decide_by.")
