"""Learning rates for single tasks: one callback, and the factors that it multiplies."""

from lightning_mtl.learning_rates.factor import Factor
from lightning_mtl.learning_rates.gradient_norm import GradientNorm
from lightning_mtl.learning_rates.importance import Importance
from lightning_mtl.learning_rates.relatedness import Relatedness
from lightning_mtl.learning_rates.task_learning_rate import TaskLearningRate

__all__ = ["Factor", "GradientNorm", "Importance", "Relatedness", "TaskLearningRate"]
