"""Callbacks that only look."""

from lightning_mtl.monitors.gates import GateUsage

__all__ = [
    "GateUsage",
]
