"""Tasks: what is declared of each, what a batch says about it, and the forms that batches may have."""

from lightning_mtl.task.labels import MaskedTarget
from lightning_mtl.task.task import Task, TaskOutput

__all__ = ["MaskedTarget", "Task", "TaskOutput"]
