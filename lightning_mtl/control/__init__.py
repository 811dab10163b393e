"""Callbacks that follow each task's validation: they stop tasks and keep their best checkpoints."""

from lightning_mtl.control.checkpoint import TaskCheckpoint
from lightning_mtl.control.early_stopping import TaskEarlyStopping

__all__ = ["TaskCheckpoint", "TaskEarlyStopping"]
