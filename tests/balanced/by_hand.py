"""Each optimizer step of a fit beside the losses differentiated one by one, with the weights that it logged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_mtl import BalancedModule, Weighting
from lightning_mtl.weighting import DBMTL, IMTL
from tests.balanced import oracle
from tests.training import Steps

LR = 0.1


class ByHand(pl.Callback):
    """Compares what each step of SGD changes with Σ w_k g_k for what tasks share, and v_k g_k for the rest.

    Args:
        weighting: The method; None for weights of 1.
        steps: What keeps the weights.
        size: Micro-batches in a full step.
        clip: The norm that gradients are clipped to.
        tolerance: Of each parameter's change, relative to the largest number of all.
    """

    def __init__(
        self,
        weighting: Weighting | None,
        steps: Steps,
        size: int = 1,
        clip: float | None = None,
        tolerance: float = 1e-9,
    ) -> None:
        self.weighting, self.steps, self.size, self.clip, self.tolerance = weighting, steps, size, clip, tolerance
        self.known: oracle.Gradients = {}  # of the fit: which tasks reach what
        self.parts: list[oracle.Gradients] = []
        self.compared = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        module: BalancedModule = pl_module
        plugin = trainer.precision_plugin
        scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
        scale = 1.0 if scaler is None else scaler.get_scale()
        with plugin.train_step_context() if isinstance(plugin, MixedPrecision) else nullcontext():
            losses = {task: output.loss for task, output in module.present_outputs(batch).items()}
        if not self.parts:
            # Weights that are known are not waited for: micro-batches add up as without a weighting.
            self.waits = self.weighting is not None and not self.weighting.known_beforehand(trainer.global_step)
            self.before = {n: p.detach().clone() for n, p in module.named_parameters()}
            if isinstance(self.weighting, IMTL):  # whose heads have scales of their own, as they were before the step
                self.scales = self.weighting.log_scales.exp().tolist()
        self.parts.append({})
        for task, loss in losses.items():
            names, parameters = zip(*module.named_parameters(), strict=True)
            given: Sequence[Tensor | None] = torch.autograd.grad(
                loss * scale, parameters, retain_graph=True, allow_unused=True
            )
            self.parts[-1][task] = {n: g.double() / scale for n, g in zip(names, given, strict=True) if g is not None}
            self.known.setdefault(task, {}).update(self.parts[-1][task])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.parts) < self.size and not trainer.is_last_batch:
            return
        found: oracle.Gradients = {}
        for task in pl_module.tasks:
            own = [part[task] for part in self.parts if task in part]
            for part in own:
                for name, gradient in part.items():
                    mean = gradient / (len(own) if self.waits else len(self.parts)) * (len(self.parts) / self.size)
                    mine = found.setdefault(task, {})
                    mine[name] = mine[name] + mean if name in mine else mean
        self.parts = []
        weights = self.steps.weights[-1]
        if weights is None or isinstance(self.weighting, DBMTL):  # a direction that no weights describe
            return
        w = {task: float(x) for task, x in zip(pl_module.tasks, weights, strict=True) if task in found}
        heads = dict.fromkeys(w, 1.0) if self.weighting is not None and not self.weighting.weighs_heads else w
        if isinstance(self.weighting, IMTL):
            heads = dict(zip(pl_module.tasks, self.scales, strict=True))
        expected = oracle.update(found, oracle.shared(self.known), w, heads)
        if self.clip is not None:
            norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
            expected = {n: gradient * min(1.0, float(self.clip / (norm + 1e-6))) for n, gradient in expected.items()}
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for n, parameter in pl_module.named_parameters():
            change = (self.before[n].double() - parameter.detach().double()) / LR
            wrong = float((change - expected.get(n, torch.zeros_like(change))).abs().max())
            assert wrong <= self.tolerance * largest + 1e-12, f"{n} moved by {change}, expected {expected.get(n)}"
        self.compared += 1
