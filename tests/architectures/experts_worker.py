"""Trains trunks whose tasks share a part, in one process or as one of a pair."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_mtl import Weighting
from lightning_mtl.monitors import GateUsage
from lightning_mtl.weighting import MGDA, GradNorm
from tests.architectures.models import batch, build
from tests.training import flat_parameters, loader, quiet_trainer

WEIGHTINGS: dict[str, Callable[[], list[Weighting]]] = {
    "equal": list,
    "MGDA": lambda: [MGDA()],
    "features": lambda: [MGDA(at="features")],
    "GradNorm": lambda: [GradNorm()],
    "absent": list,
    "absent, MGDA": lambda: [MGDA()],
}
CASES = (
    ("MTAN", "equal"),
    ("MTAN", "MGDA"),
    ("MTAN", "GradNorm"),
    ("PLE", "MGDA"),
    ("PLE", "features"),
    ("DSelectK", "MGDA"),
    ("MMoE", "absent"),
    ("DSelectK", "absent, MGDA"),
)


def part(seed: int, rank: int, ranks: int, absent: str | None) -> Any:
    x, targets = batch(8, seed)
    if absent is not None and seed:
        del targets[absent]
    size = len(x) // ranks
    own = slice(rank * size, (rank + 1) * size)
    return x[own], {task: y[own] for task, y in targets.items()}


def train(kind: str, weighting: str, rank: int, ranks: int) -> dict[str, Any]:
    absent = "b" if "absent" in weighting else None
    # Momentum and decay move what has a gradient of zero.
    extra: dict[str, Any] = {"momentum": 0.9, "weight_decay": 0.1} if absent else {}
    module, usage = build(kind, optimizer=functools.partial(torch.optim.SGD, lr=0.5, **extra)), GateUsage()
    trainer = quiet_trainer(
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        callbacks=[usage, *WEIGHTINGS[weighting]()],
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader(*[part(seed, rank, ranks, absent) for seed in range(2)]))
    return {
        "parameters": flat_parameters(module),
        "tables": {name: table.values for name, table in usage.latest.items()},
        "scalars": {name: value for name, value in trainer.callback_metrics.items() if "sparsity" in name},
    }
