"""The contract's table: one row or more for each weighting that the package exports.

A new method costs a row here; ``test_contract.py`` fails for an exported one without. The golden values are exact
weights in float64 from independent solvers, copied as literals.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mtl import Aggregator, Weighting
from lightning_mtl.weighting import (
    CRMOGM,
    DTP,
    DWA,
    FAMO,
    GLS,
    IMTL,
    IMTLG,
    IMTLL,
    LBTW,
    MGDA,
    RLW,
    STCH,
    AlignedMTL,
    CAGrad,
    ConFIG,
    CoVWeighting,
    DualProj,
    FairGrad,
    FromTorchJD,
    GradDrop,
    GradientNormBalance,
    GradNorm,
    GradVac,
    NashMTL,
    PCGrad,
    ScaleInvariant,
    StaticWeights,
    UncertaintyWeighting,
    UPGrad,
)
from tests.contract import J1, J2, Golden, Row
from tests.contract_physics import PHYSICS
from tests.contract_shelf import SHELF


def inverse_norms(gramian: Tensor) -> Tensor:
    """Stands for a weighting of TorchJD, which need not be installed."""
    return 1 / gramian.diagonal().sqrt().clamp(min=1e-30)


NO_BOUND = -torch.inf
KINDS: Mapping[str, Any] = {"a": "classification", "c": "classification"}

of_gramian = functools.partial(Row, measures="gramian", weighs_heads=False)

ROWS: tuple[Row, ...] = (
    Row(
        "StaticWeights",
        functools.partial(StaticWeights, weights={"a": 1.0, "b": 2.0, "c": 3.0}),
        by_name=True,
        golden=(Golden([1.0, 2.0, 3.0], losses=[0.5, 2.0, 1.0]),),
    ),
    Row("StaticWeights", StaticWeights, golden=(Golden([1.0, 1.0, 1.0], losses=[0.5, 2.0, 1.0]),)),
    Row(
        "UncertaintyWeighting",
        UncertaintyWeighting,
        golden=(
            Golden([0.5, 0.5, 0.5], losses=[0.5, 2.0, 1.0]),
            Golden(
                [0.45241870901797976, 0.6107013790800849, 0.37040911034085894],
                losses=[0.5, 2.0, 1.0],
                state={"log_variances": [0.1, -0.2, 0.3]},
            ),
        ),
    ),
    Row("UncertaintyWeighting", functools.partial(UncertaintyWeighting, kinds=KINDS, lr=0.1), by_name=True),
    Row("UncertaintyWeighting", functools.partial(UncertaintyWeighting, regularizer="log1p", lr=0.1)),
    Row("GradNorm", GradNorm, "norms", total="K"),
    Row("GradNorm", functools.partial(GradNorm, alpha=0.12, lr=0.1, at="trunk"), "norms", total="K"),
    Row("DWA", DWA, total="K"),
    of_gramian(
        "MGDA",
        MGDA,
        total=1.0,
        unique=False,
        golden=(
            Golden([0.6000000000000001, 0.4], rows=J1),
            Golden([0.0, 0.49306759098786823, 0.5069324090121318], rows=J2),
        ),
    ),
    of_gramian("MGDA", functools.partial(MGDA, normalize="l2", at="features"), unique=False),
    of_gramian("MGDA", functools.partial(MGDA, normalize="loss"), unique=False),
    of_gramian("MGDA", functools.partial(MGDA, normalize="loss+", every_n_steps=2), unique=False),
    Row("DTP", functools.partial(DTP, "accuracy", stage="train"), required=("accuracy",)),
    Row("DTP", functools.partial(DTP, "accuracy", gamma=2.0, alpha=0.3), required=("accuracy",)),
    Row("LBTW", LBTW),
    Row("LBTW", functools.partial(LBTW, alpha=0.1, reference="training")),
    Row("GradientNormBalance", GradientNormBalance, "norms", total="K"),
    Row(
        "GradientNormBalance",
        functools.partial(GradientNormBalance, at="last_layer", every_n_steps=3),
        "norms",
        total="K",
    ),
    Row("RLW", RLW, total=1.0, unique=None, equivariant=False),
    Row("RLW", functools.partial(RLW, "dirichlet", seed=3, total=5.0), total=5.0, unique=None, equivariant=False),
    Row("GLS", GLS, golden=(Golden([2 / 3, 1 / 6, 1 / 3], losses=[0.5, 2.0, 1.0]),)),
    Row("GLS", functools.partial(GLS, total=2.0)),
    Row("ScaleInvariant", ScaleInvariant, golden=(Golden([2.0, 0.5, 1.0], losses=[0.5, 2.0, 1.0]),)),
    Row(
        "IMTLL",
        IMTLL,
        golden=(
            Golden([1.0, 1.0, 1.0], losses=[0.5, 2.0, 1.0]),
            Golden(
                [1.1051709180756477, 0.8187307530779818, 1.3498588075760032],
                losses=[0.5, 2.0, 1.0],
                state={"log_scales": [0.1, -0.2, 0.3]},
            ),
        ),
    ),
    Row("STCH", functools.partial(STCH, mu=1e-3, warmup_epochs=0)),
    Row("STCH", functools.partial(STCH, mu=0.3, warmup_epochs=1, preference={"a": 2.0}), by_name=True),
    Row("STCH", STCH),
    Row(
        "FAMO",
        FAMO,
        total=1.0,
        golden=(
            Golden([0.5454545440495868, 0.2727272733884297, 0.18181818256198345], losses=[1.0, 2.0, 3.0]),
            Golden(
                [0.4615843390510839, 0.39516534754876836, 0.1432503134001478],
                losses=[0.9, 1.0, 2.9],
                state={"logits": [0.024999995642303097, -0.024999998195716445, 0.024999996920780625]},
            ),
        ),
    ),
    Row("FAMO", functools.partial(FAMO, losses_after="next_batch", gamma=0.001), total=1.0),
    Row("FAMO", functools.partial(FAMO, min_losses={"a": -1.0}, losses_after="next_batch"), total=1.0, by_name=True),
    Row("CoVWeighting", CoVWeighting, total=1.0),
    of_gramian("PCGrad", PCGrad, unique=None, equivariant=False, lowest=1.0),
    of_gramian(
        "PCGrad", functools.partial(PCGrad, seed=7, every_n_steps=2), unique=None, equivariant=False, lowest=1.0
    ),
    of_gramian("GradVac", GradVac, unique=None, equivariant=False, lowest=1.0),
    of_gramian("GradVac", functools.partial(GradVac, beta=0.5), unique=None, equivariant=False),
    of_gramian(
        "CAGrad",
        CAGrad,
        unique=None,
        golden=(
            Golden([0.7041241452319316, 0.5], rows=J1),
            Golden([0.3333333333333333, 0.7187109453411793, 0.574890280652472], rows=J2),
        ),
    ),
    of_gramian("CAGrad", functools.partial(CAGrad, c=1.5, rescale="c"), unique=None),
    of_gramian(
        "IMTLG",
        IMTLG,
        total=1.0,
        lowest=NO_BOUND,
        golden=(
            Golden([0.5923303169377979, 0.40766968306220214], rows=J1),
            Golden([0.09075658974570269, 0.4734801112599324, 0.43576329899436494], rows=J2),
        ),
    ),
    of_gramian("IMTL", IMTL, lowest=NO_BOUND, golden=(Golden([0.5923303169377979, 0.40766968306220214], rows=J1),)),
    Row(
        "NashMTL",
        NashMTL,
        "gramian",
        golden=(
            Golden([0.5914611522293678, 0.4070714828838854], rows=J1),
            Golden([0.1969703917176407, 0.4305756519192961, 0.3891758622858842], rows=J2),
        ),
    ),
    Row(
        "NashMTL",
        functools.partial(NashMTL, max_norm=1.0, every_n_steps=3),
        "gramian",
        golden=(
            Golden([0.41822619154979485, 0.28784300597485896], rows=J1),
            Golden([0.11372090868056589, 0.24859296854210422, 0.22469078885285998], rows=J2),
        ),
    ),
    of_gramian(
        "AlignedMTL",
        AlignedMTL,
        unique=None,
        lowest=NO_BOUND,
        golden=(
            Golden([0.5590719156565607, 0.40826106809915186], rows=J1),
            Golden([0.08034525288846656, 0.25792569411597893, 0.2579239593772103], rows=J2),
        ),
    ),
    of_gramian(
        "AlignedMTL",
        functools.partial(AlignedMTL, "rmse", preference={"b": 3.0}),
        unique=None,
        by_name=True,
        lowest=NO_BOUND,
    ),
    of_gramian(
        "UPGrad",
        UPGrad,
        unique=None,
        golden=(
            Golden([1.1111111111111112, 0.7894736842105263], rows=J1),
            Golden([0.3333333333333333, 0.37142857142857144, 0.37262606417812705], rows=J2),
        ),
    ),
    of_gramian("UPGrad", functools.partial(UPGrad, preference={"a": 2.0}), unique=None, by_name=True),
    of_gramian(
        "DualProj",
        DualProj,
        unique=None,
        golden=(
            Golden([0.6111111111111112, 0.5], rows=J1),
            Golden([0.3333333333333333, 0.3333333333333333, 0.3333333333333333], rows=J2),
        ),
    ),
    of_gramian(
        "ConFIG",
        ConFIG,
        lowest=NO_BOUND,
        golden=(
            Golden([1.2264831572567787, 0.8441236008058428], rows=J1),
            Golden([0.31246472717737656, 1.6301387502911682, 1.5002840093012022], rows=J2),
        ),
    ),
    of_gramian(
        "FairGrad",
        FairGrad,
        golden=(
            Golden([0.5914611522293678, 0.4070714828838854], rows=J1),
            Golden([0.1969703917176407, 0.4305756519192961, 0.3891758622858842], rows=J2),
        ),
    ),
    of_gramian(
        "FairGrad",
        functools.partial(FairGrad, alpha=2.0),
        golden=(
            Golden([0.4713629223235375, 0.31945422818549524], rows=J1),
            Golden([0.09750249240581733, 0.336121875269354, 0.31007079919125025], rows=J2),
        ),
    ),
    of_gramian(
        "CRMOGM",
        lambda: CRMOGM(MGDA()),
        required=(MGDA(),),
        total=1.0,
        unique=False,
        golden=(Golden([0.6000000000000001, 0.4], rows=J1),),
    ),
    Row("CRMOGM", lambda: CRMOGM(GradNorm(), alpha=0.5), "norms", required=(GradNorm(),), total="K"),
    Row("CRMOGM", lambda: CRMOGM(UncertaintyWeighting(lr=0.1)), required=(UncertaintyWeighting(),)),
    of_gramian("CRMOGM", lambda: CRMOGM(GradVac()), required=(GradVac(),), unique=None, equivariant=False),
    of_gramian("FromTorchJD", functools.partial(FromTorchJD, inverse_norms), required=(inverse_norms,)),
    *SHELF,
    *PHYSICS,
)

AGGREGATORS: tuple[Callable[[], Aggregator], ...] = (GradDrop, functools.partial(GradDrop, leak=0.3, seed=2))

MAKES: tuple[Callable[[], Weighting], ...] = (*(row.make for row in ROWS if row.fits), *AGGREGATORS)
# Each method once, as in its first row for tasks of any name.
METHODS: dict[str, Callable[[], Weighting]] = {}
for _make in (*(row.make for row in ROWS if row.fits and not row.by_name), *AGGREGATORS):
    METHODS.setdefault(type(_make()).__name__, _make)
