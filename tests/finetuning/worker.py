"""Unfreezes a trunk step by step, in one process or as one of a pair on half of every batch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_mtl.finetuning import GradualUnfreezing
from lightning_mtl.weighting import MGDA, GradDrop, GradNorm
from tests.small import Batch, batches, small
from tests.training import History, fit, loader

DDP = functools.partial(DDPStrategy, process_group_backend="gloo")
FLAVORS: Mapping[str, Any] = {
    "default": DDP,
    "find_unused_parameters": functools.partial(DDP, find_unused_parameters=True),
    "static_graph": functools.partial(DDP, static_graph=True),
}
WEIGHTINGS: Mapping[str, Any] = {
    "losses": list,
    "GradNorm at the last layer": lambda: [GradNorm()],
    "MGDA at the features": lambda: [MGDA(at="features")],
    "MGDA at the trunk": lambda: [MGDA()],
    "GradDrop at the trunk": lambda: [GradDrop()],
}
CASES = [
    *(("default", weighting, False) for weighting in WEIGHTINGS),
    ("default", "losses", True),
    ("default", "MGDA at the features", True),
    ("find_unused_parameters", "losses", False),
    ("find_unused_parameters", "MGDA at the features", False),
    ("static_graph", "losses", False),
    ("static_graph", "losses", True),
    ("static_graph", "MGDA at the features", False),
    ("static_graph", "MGDA at the trunk", False),
]


def half(batch: Batch, rank: int, ranks: int) -> Batch:
    inputs, targets = batch
    return inputs[rank::ranks].double(), {task: target[rank::ranks].double() for task, target in targets.items()}


def train(flavor: str, weighting: str, automatic: bool, rank: int = 0, ranks: int = 1) -> Tensor:
    """Parameters after each of eight steps; a layer of the trunk is unfrozen in the second and in the third epoch."""
    module = small(optimizer=functools.partial(torch.optim.SGD, lr=0.1)).double()
    module.automatic_optimization = automatic
    history = History()
    fit(
        module,
        loader(*(half(batch, rank, ranks) for batch in batches(4, 4))),
        max_epochs=4,
        callbacks=[*WEIGHTINGS[weighting](), GradualUnfreezing(every_n_epochs=1, lr_decay=0.5), history],
        devices=ranks,
        strategy="auto" if ranks == 1 else FLAVORS[flavor](),
        use_distributed_sampler=False,
    )
    return torch.stack(history.parameters)
