"""A data module with a dataset for each task: loaders that keep the tasks' names, and ways to mix the tasks."""

from lightning_mtl.data.adaptive import Adaptive
from lightning_mtl.data.datamodule import MultiTaskDataModule
from lightning_mtl.data.mixing import Joint, Mixing, Proportional, Ratios, RoundRobin
from lightning_mtl.data.schedule import Schedule

__all__ = ["Adaptive", "Joint", "Mixing", "MultiTaskDataModule", "Proportional", "Ratios", "RoundRobin", "Schedule"]
