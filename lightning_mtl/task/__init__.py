"""Tasks are declared, labeled and read from batches here."""

from lightning_mtl.task.labels import MaskedTarget
from lightning_mtl.task.task import Task, TaskOutput

__all__ = ["MaskedTarget", "Task", "TaskOutput"]
