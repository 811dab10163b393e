"""Trunks that plug into a ``MultiTaskModule`` unchanged."""

from lightning_mtl.architectures.layers import MLP, Layers

__all__ = ["MLP", "Layers"]
