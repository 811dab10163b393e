"""The balancing methods of the literature are Lightning callbacks, one a file."""

from lightning_mtl.weighting.aligned_mtl import AlignedMTL
from lightning_mtl.weighting.auxiliary_cosine import AuxiliaryCosine
from lightning_mtl.weighting.cagrad import CAGrad
from lightning_mtl.weighting.config import ConFIG
from lightning_mtl.weighting.cov_weighting import CoVWeighting
from lightning_mtl.weighting.crmogm import CRMOGM
from lightning_mtl.weighting.dbmtl import DBMTL
from lightning_mtl.weighting.dtp import DTP
from lightning_mtl.weighting.dualproj import DualProj
from lightning_mtl.weighting.dwa import DWA
from lightning_mtl.weighting.excess_mtl import ExcessMTL
from lightning_mtl.weighting.fairgrad import FairGrad
from lightning_mtl.weighting.famo import FAMO
from lightning_mtl.weighting.from_torchjd import FromTorchJD
from lightning_mtl.weighting.frozen import Frozen
from lightning_mtl.weighting.gls import GLS
from lightning_mtl.weighting.graddrop import GradDrop
from lightning_mtl.weighting.gradient_norm_balance import GradientNormBalance
from lightning_mtl.weighting.gradnorm import GradNorm
from lightning_mtl.weighting.gradvac import GradVac
from lightning_mtl.weighting.igb import IGB
from lightning_mtl.weighting.imtl import IMTL
from lightning_mtl.weighting.imtlg import IMTLG
from lightning_mtl.weighting.imtll import IMTLL
from lightning_mtl.weighting.lbtw import LBTW
from lightning_mtl.weighting.lr_annealing import LRAnnealing
from lightning_mtl.weighting.metabalance import MetaBalance
from lightning_mtl.weighting.mgda import MGDA
from lightning_mtl.weighting.nash_mtl import NashMTL
from lightning_mtl.weighting.ntk import NTKWeighting
from lightning_mtl.weighting.pcgrad import PCGrad
from lightning_mtl.weighting.pivrg import PIVRG
from lightning_mtl.weighting.relobralo import ReLoBRaLo
from lightning_mtl.weighting.rlw import RLW
from lightning_mtl.weighting.rotating import Rotating
from lightning_mtl.weighting.scale_invariant import ScaleInvariant
from lightning_mtl.weighting.sdmgrad import SDMGrad
from lightning_mtl.weighting.soft_optimal_uncertainty import SoftOptimalUncertainty
from lightning_mtl.weighting.softadapt import SoftAdapt
from lightning_mtl.weighting.static import StaticWeights
from lightning_mtl.weighting.stch import STCH
from lightning_mtl.weighting.uncertainty import UncertaintyWeighting
from lightning_mtl.weighting.upgrad import UPGrad

__all__ = [
    "CRMOGM",
    "DBMTL",
    "DTP",
    "DWA",
    "FAMO",
    "GLS",
    "IGB",
    "IMTL",
    "IMTLG",
    "IMTLL",
    "LBTW",
    "MGDA",
    "PIVRG",
    "RLW",
    "STCH",
    "AlignedMTL",
    "AuxiliaryCosine",
    "CAGrad",
    "CoVWeighting",
    "ConFIG",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "FromTorchJD",
    "Frozen",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GradientNormBalance",
    "LRAnnealing",
    "MetaBalance",
    "NTKWeighting",
    "NashMTL",
    "PCGrad",
    "ReLoBRaLo",
    "Rotating",
    "SDMGrad",
    "ScaleInvariant",
    "SoftAdapt",
    "SoftOptimalUncertainty",
    "StaticWeights",
    "UPGrad",
    "UncertaintyWeighting",
]
