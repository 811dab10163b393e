"""Multi-task learning for PyTorch Lightning: a callback balances the losses of a module, or its tasks."""

from lightning_mtl.balanced import BalancedModule
from lightning_mtl.method.aggregator import Aggregator
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Signals
from lightning_mtl.module import MultiTaskModule
from lightning_mtl.monitors.base import Monitor
from lightning_mtl.task import Task, TaskOutput
from lightning_mtl.task.labels import MaskedTarget

# pyproject.toml reads it from here, so that a checkout that is not installed knows it, too.
__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "BalancedModule",
    "MaskedTarget",
    "Monitor",
    "MultiTaskModule",
    "Signals",
    "Task",
    "TaskOutput",
    "Weighting",
    "__version__",
]
