"""Whether learning together helped: tasks trained alone, the comparison with them, and transfer to an unseen task."""

from lightning_mtl.transfer.baselines import SingleTaskBaselines, single_task_baselines
from lightning_mtl.transfer.scores import TaskScores, task_scores
from lightning_mtl.transfer.training import only_tasks, train_and_score

__all__ = [
    "SingleTaskBaselines",
    "TaskScores",
    "only_tasks",
    "single_task_baselines",
    "task_scores",
    "train_and_score",
]
