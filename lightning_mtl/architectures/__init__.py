"""Trunks for several tasks. Each returns one tensor for all heads, or a dict with an entry for each task."""

from lightning_mtl.architectures.branch_schedule import Branching
from lightning_mtl.architectures.branching import LTB
from lightning_mtl.architectures.cost_report import Cost, ParameterReport, parameter_report
from lightning_mtl.architectures.cross_stitch import CrossStitch
from lightning_mtl.architectures.dselect_k import DSelectK
from lightning_mtl.architectures.mlp import MLP, Layers
from lightning_mtl.architectures.mmoe import MMoE
from lightning_mtl.architectures.mtan import MTAN
from lightning_mtl.architectures.ple import CGC, PLE
from lightning_mtl.architectures.soft_sharing import SoftSharing

__all__ = [
    "CGC",
    "LTB",
    "MLP",
    "MTAN",
    "PLE",
    "Branching",
    "Cost",
    "CrossStitch",
    "DSelectK",
    "Layers",
    "MMoE",
    "ParameterReport",
    "SoftSharing",
    "parameter_report",
]
