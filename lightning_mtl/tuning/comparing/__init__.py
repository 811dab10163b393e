"""Comparisons of weighting methods, scales and single-task models on a user's own data, with the same care for all."""

from lightning_mtl.tuning.comparing.comparison import compare
from lightning_mtl.tuning.comparing.result import Comparison
from lightning_mtl.tuning.comparing.setups import Setup

__all__ = ["Comparison", "Setup", "compare"]
