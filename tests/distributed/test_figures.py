"""Figures of an epoch on two processes: over all samples, equal on both, and logged without advice to reduce them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lightning_mtl import MultiTaskModule, Task
from tests.distributed.pairs import Pair
from tests.distributed.table import DDP
from tests.small import batches, binary
from tests.training import Memory, loader, quiet_trainer


def train(rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Fit and test on a rank's samples; return the metrics, the warnings and the names that reach a logger."""
    plain, memory = binary(), Memory()
    tasks = {
        name: Task(task.loss, task.metrics, {"accuracy": 0.9}, missing=torch.nan) for name, task in plain.tasks.items()
    }
    module = MultiTaskModule(plain.trunk, dict(plain.heads.items()), tasks)
    mine = slice(rank, None, ranks)
    data = loader(*[(x[mine], {task: y[mine] for task, y in targets.items()}) for x, targets in batches(4, 6)])
    trainer = quiet_trainer(
        devices=ranks,
        strategy="auto" if ranks == 1 else DDP(),
        use_distributed_sampler=False,
        logger=memory,
        max_epochs=2,
        log_every_n_steps=1,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, data, data)
        found = dict(trainer.callback_metrics)
        trainer.test(module, data, verbose=False)
        found.update(trainer.callback_metrics)
    return {
        "metrics": {name: float(value) for name, value in found.items()},
        "said": [str(warning.message) for warning in said],
        "logged": sorted({name for _, line in memory.lines for name in line}),
    }


def test_figures_over_both_ranks_are_logged_without_advice(pair: Pair) -> None:
    alone, both = train(), pair.run(train)
    for found in both:
        assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
        assert [message for message in found["said"] if "sync_dist" in message] == []
    assert both[0]["logged"] == alone["logged"]
    assert {"val/loss/total", "test/accuracy/a", "val/delta_m", "labeled/b", "loss_epoch/a"} <= set(alone["logged"])
