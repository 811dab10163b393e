"""Trunks that share less, or more cleverly, than one stack of layers: they plug into ``MultiTaskModule`` unchanged."""

from lightning_mtl.architectures.cgc import CGC
from lightning_mtl.architectures.dselect_k import DSelectK
from lightning_mtl.architectures.mmoe import MMoE
from lightning_mtl.architectures.mtan import MTAN
from lightning_mtl.architectures.ple import PLE

__all__ = [
    "CGC",
    "MTAN",
    "PLE",
    "DSelectK",
    "MMoE",
]
