"""Trunks for several tasks; each returns one tensor for all heads, or a dict with an entry a task."""

from lightning_mtl.architectures.branch_schedule import Branching
from lightning_mtl.architectures.branching import LTB
from lightning_mtl.architectures.cross_stitch import CrossStitch
from lightning_mtl.architectures.layers import MLP, Layers
from lightning_mtl.architectures.report import Cost, ParameterReport, parameter_report
from lightning_mtl.architectures.soft_sharing import SoftSharing

__all__ = [
    "LTB",
    "MLP",
    "Branching",
    "Cost",
    "CrossStitch",
    "Layers",
    "ParameterReport",
    "SoftSharing",
    "parameter_report",
]
