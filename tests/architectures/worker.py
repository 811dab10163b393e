"""Trains each trunk, in one process or as one of a pair on half of every batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_mtl.architectures import LTB, Branching
from lightning_mtl.weighting import MGDA, GradNorm
from tests.architectures.trunks import build, regression
from tests.training import fit, flat_parameters, loader

WEIGHTINGS: Mapping[str, Any] = {
    "losses": list,
    "GradNorm at the last layer": lambda: [GradNorm()],
    "MGDA at the features": lambda: [MGDA(at="features")],
    "MGDA at the trunk": lambda: [MGDA()],
}
CASES = [
    (trunk, weighting)
    for trunk in ("soft sharing", "trace norm", "cross-stitch", "learning to branch")
    for weighting in WEIGHTINGS
]


def half(batch: Any, rank: int, ranks: int) -> Any:
    inputs, targets = batch
    return inputs[rank::ranks], {task: target[rank::ranks] for task, target in targets.items()}


def train(trunk: str, weighting: str, rank: int = 0, ranks: int = 1) -> Tensor:
    """Parameters after nine steps; a branching trunk is hardened after the sixth."""
    module = build(trunk).double()
    data = [regression(8, seed=seed) for seed in range(3)]
    doubled = [(inputs.double(), {k: y.double() for k, y in targets.items()}) for inputs, targets in data]
    callbacks = list(WEIGHTINGS[weighting]())
    if isinstance(module.trunk, LTB):
        callbacks.append(Branching(harden_epoch=2, heatmaps=False))
    fit(
        module,
        loader(*(half(batch, rank, ranks) for batch in doubled)),
        max_epochs=3,
        callbacks=callbacks,
        devices=ranks,
        strategy="auto" if ranks == 1 else DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
    )
    if isinstance(module.trunk, LTB):
        assert module.trunk.hardened
    return flat_parameters(module)
