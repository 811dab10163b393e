"""The balancing methods of the literature, one Lightning callback each."""

from lightning_mtl.weighting.dtp import DTP
from lightning_mtl.weighting.dwa import DWA
from lightning_mtl.weighting.gradient_norm_balance import GradientNormBalance
from lightning_mtl.weighting.gradnorm import GradNorm
from lightning_mtl.weighting.lbtw import LBTW
from lightning_mtl.weighting.mgda import MGDA
from lightning_mtl.weighting.static import StaticWeights
from lightning_mtl.weighting.uncertainty import UncertaintyWeighting

__all__ = ["DTP", "DWA", "LBTW", "MGDA", "GradNorm", "GradientNormBalance", "StaticWeights", "UncertaintyWeighting"]
