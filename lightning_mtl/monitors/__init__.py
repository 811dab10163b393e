"""Monitors, which never change a training: gradient conflict, task affinity and groups, convergence, gates, time."""

from lightning_mtl.method.signals import cosines
from lightning_mtl.monitors.affinity import TaskAffinity, first_order_affinity, lookahead_affinity
from lightning_mtl.monitors.conflict import GradientConflict, conflict_measures, magnitude_similarity
from lightning_mtl.monitors.convergence import Convergence
from lightning_mtl.monitors.course import Course, describe_course
from lightning_mtl.monitors.fit_table import FitTable
from lightning_mtl.monitors.gates import GateUsage
from lightning_mtl.monitors.grouping import best_grouping, grouping_score
from lightning_mtl.monitors.throughput import Throughput

__all__ = [
    "Convergence",
    "Course",
    "FitTable",
    "GateUsage",
    "GradientConflict",
    "TaskAffinity",
    "Throughput",
    "best_grouping",
    "conflict_measures",
    "cosines",
    "describe_course",
    "first_order_affinity",
    "grouping_score",
    "lookahead_affinity",
    "magnitude_similarity",
]
