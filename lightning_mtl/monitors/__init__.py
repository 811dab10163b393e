"""Callbacks that only look: conflicts between gradients, affinities between tasks, convergence, where the time goes."""

from lightning_mtl.monitors.affinity import TaskAffinity, first_order_affinity, lookahead_affinity
from lightning_mtl.monitors.conflict import GradientConflict, conflict_measures, cosines, magnitude_similarity
from lightning_mtl.monitors.grouping import best_grouping

__all__ = [
    "GradientConflict",
    "TaskAffinity",
    "best_grouping",
    "conflict_measures",
    "cosines",
    "first_order_affinity",
    "lookahead_affinity",
    "magnitude_similarity",
]
