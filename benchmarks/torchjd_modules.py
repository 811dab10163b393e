"""Each method as TorchJD has it, in LightningModules written as its documentation recommends.

``Autojac`` is its page on Lightning: manual optimization, ``mtl_backward``, then ``jac_to_grad``. ``Autogram`` is its
Gramian engine, which weighs the heads' gradients, too. ``Scalarized`` is what one writes for a scalarizer;
``ScalarizedFAMO`` computes the losses once more after the step, as FAMO needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchjd import aggregation, scalarization
from torchjd.autogram import Engine
from torchjd.autojac import jac_to_grad, mtl_backward

from benchmarks.step_cases import LEARNING_RATE, Batch, Heads
from lightning_mtl import Weighting
from lightning_mtl import weighting as ours


class Heading(pl.LightningModule):
    """A trunk and its heads, and the losses of a batch."""

    def __init__(self, trunk: nn.Module, heads: Heads) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.trunk, self.heads = trunk, nn.ModuleDict(heads)

    def losses(self, features: Tensor, targets: dict[str, Tensor]) -> list[Tensor]:
        return [cross_entropy(head(features), targets[task]) for task, head in self.heads.items()]

    def descend(self) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # noqa: S101 - for mypy
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)


class Autojac(Heading):
    def __init__(self, trunk: nn.Module, heads: Heads, aggregator: aggregation.Aggregator, chunk: int | None) -> None:
        super().__init__(trunk, heads)
        self.aggregator, self.chunk = aggregator, chunk

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, targets = batch
        features = self.trunk(inputs)
        mtl_backward(self.losses(features, targets), features=features, parallel_chunk_size=self.chunk)
        jac_to_grad(self.trunk.parameters(), self.aggregator)
        self.descend()


class Autogram(Heading):
    def __init__(self, trunk: nn.Module, heads: Heads, weighting: nn.Module) -> None:
        super().__init__(trunk, heads)
        self.weighting = weighting
        self.engine = Engine(trunk, batch_dim=None)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, targets = batch
        losses = torch.stack(self.losses(self.trunk(inputs), targets))
        losses.backward(self.weighting(self.engine.compute_gramian(losses)))
        self.descend()


class Scalarized(Heading):
    def __init__(self, trunk: nn.Module, heads: Heads, scalarizer: nn.Module) -> None:
        super().__init__(trunk, heads)
        self.automatic_optimization = True
        self.scalarizer = scalarizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss: Tensor = self.scalarizer(torch.stack(self.losses(self.trunk(inputs), targets)))
        return loss


class ScalarizedFAMO(Heading):
    def __init__(self, trunk: nn.Module, heads: Heads) -> None:
        super().__init__(trunk, heads)
        # Not a part of the module, whose optimizer would take its parameters.
        self.scalarizers = (scalarization.FAMO(len(heads)),)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        inputs, targets = batch
        (famo,) = self.scalarizers
        famo.to(self.device)
        famo(torch.stack(self.losses(self.trunk(inputs), targets))).backward()
        self.descend()
        with torch.no_grad():
            famo.update(torch.stack(self.losses(self.trunk(inputs), targets)))


@dataclass(frozen=True)
class Method:
    """A method at both houses, with the same settings: ours, its aggregator of K rows, its weighting of a Gramian."""

    ours: Callable[[], Weighting]
    aggregator: Callable[[int], Any]
    weighting: Callable[[], Any] | None


METHODS = {
    "MGDA": Method(ours.MGDA, lambda _: aggregation.MGDA(), aggregation.MGDAWeighting),
    "PCGrad": Method(ours.PCGrad, lambda _: aggregation.PCGrad(), aggregation.PCGradWeighting),
    "CAGrad": Method(
        lambda: ours.CAGrad(c=0.5), lambda _: aggregation.CAGrad(c=0.5), lambda: aggregation.CAGradWeighting(c=0.5)
    ),
    "UPGrad": Method(ours.UPGrad, lambda _: aggregation.UPGrad(), aggregation.UPGradWeighting),
    "IMTLG": Method(ours.IMTLG, lambda _: aggregation.IMTLG(), aggregation.IMTLGWeighting),
    "AlignedMTL": Method(ours.AlignedMTL, lambda _: aggregation.AlignedMTL(), aggregation.AlignedMTLWeighting),
    "NashMTL": Method(lambda: ours.NashMTL(max_norm=1.0), lambda k: aggregation.NashMTL(n_tasks=k), None),
    "FairGrad": Method(
        lambda: ours.FairGrad(alpha=1.0),
        lambda _: aggregation.FairGrad(alpha=1.0),
        lambda: aggregation.FairGradWeighting(alpha=1.0),
    ),
}

Make = Callable[[nn.Module, Heads], pl.LightningModule]


@dataclass(frozen=True)
class Scalarization:
    ours: Callable[[], Weighting]
    theirs: Make


SCALARIZATIONS = {
    "UW": Scalarization(ours.UncertaintyWeighting, lambda t, h: Scalarized(t, h, scalarization.UW(len(h)))),
    "DWA": Scalarization(ours.DWA, lambda t, h: Scalarized(t, h, scalarization.DWA())),
    "STCH": Scalarization(
        lambda: ours.STCH(mu=1.0, warmup_epochs=0), lambda t, h: Scalarized(t, h, scalarization.STCH(mu=1.0))
    ),
    "FAMO": Scalarization(ours.FAMO, ScalarizedFAMO),
}
