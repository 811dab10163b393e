"""The balancing methods of the literature are Lightning callbacks, one a file."""

from lightning_mtl.weighting.aligned_mtl import AlignedMTL
from lightning_mtl.weighting.cagrad import CAGrad
from lightning_mtl.weighting.config import ConFIG
from lightning_mtl.weighting.cov_weighting import CoVWeighting
from lightning_mtl.weighting.crmogm import CRMOGM
from lightning_mtl.weighting.dtp import DTP
from lightning_mtl.weighting.dualproj import DualProj
from lightning_mtl.weighting.dwa import DWA
from lightning_mtl.weighting.fairgrad import FairGrad
from lightning_mtl.weighting.famo import FAMO
from lightning_mtl.weighting.from_torchjd import FromTorchJD
from lightning_mtl.weighting.gls import GLS
from lightning_mtl.weighting.graddrop import GradDrop
from lightning_mtl.weighting.gradient_norm_balance import GradientNormBalance
from lightning_mtl.weighting.gradnorm import GradNorm
from lightning_mtl.weighting.gradvac import GradVac
from lightning_mtl.weighting.imtl import IMTL
from lightning_mtl.weighting.imtlg import IMTLG
from lightning_mtl.weighting.imtll import IMTLL
from lightning_mtl.weighting.lbtw import LBTW
from lightning_mtl.weighting.mgda import MGDA
from lightning_mtl.weighting.nash_mtl import NashMTL
from lightning_mtl.weighting.pcgrad import PCGrad
from lightning_mtl.weighting.rlw import RLW
from lightning_mtl.weighting.scale_invariant import ScaleInvariant
from lightning_mtl.weighting.static import StaticWeights
from lightning_mtl.weighting.stch import STCH
from lightning_mtl.weighting.uncertainty import UncertaintyWeighting
from lightning_mtl.weighting.upgrad import UPGrad

__all__ = [
    "CRMOGM",
    "DTP",
    "DWA",
    "FAMO",
    "GLS",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "LBTW",
    "MGDA",
    "RLW",
    "STCH",
    "AlignedMTL",
    "CAGrad",
    "CoVWeighting",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "FromTorchJD",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GradientNormBalance",
    "NashMTL",
    "PCGrad",
    "ScaleInvariant",
    "StaticWeights",
    "UPGrad",
    "UncertaintyWeighting",
]
