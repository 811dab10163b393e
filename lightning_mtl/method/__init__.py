"""Those who write methods begin with these bases: weightings, aggregators, and the signals that they read."""

from lightning_mtl.method.aggregator import Aggregator
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.signals import Signals

__all__ = ["Aggregator", "Signals", "Weighting"]
