"""Measures whether learning together helped: single-task baselines, a comparison with them, a transfer probe."""

from lightning_mtl.transfer.baselines import SingleTaskBaselines, single_task_baselines
from lightning_mtl.transfer.comparison import TransferReport
from lightning_mtl.transfer.finished import TaskScores
from lightning_mtl.transfer.probe import ProbeResult, probe_transfer
from lightning_mtl.transfer.runs import only_tasks, task_scores, train_and_score

__all__ = [
    "ProbeResult",
    "SingleTaskBaselines",
    "TaskScores",
    "TransferReport",
    "only_tasks",
    "probe_transfer",
    "single_task_baselines",
    "task_scores",
    "train_and_score",
]
