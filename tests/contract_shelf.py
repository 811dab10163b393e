"""More rows of the contract's table: methods for auxiliary tasks, of validation's scores, and others of later years."""

from __future__ import annotations

import functools

from lightning_mtl.weighting import (
    DBMTL,
    IGB,
    MGDA,
    PIVRG,
    AuxiliaryCosine,
    ExcessMTL,
    Frozen,
    MetaBalance,
    SDMGrad,
    SoftOptimalUncertainty,
)
from tests.contract import J1, J2, Golden, Row

of_gramian = functools.partial(Row, measures="gramian", weighs_heads=False)

SHELF: tuple[Row, ...] = (
    Row(
        "SoftOptimalUncertainty",
        SoftOptimalUncertainty,
        total=1.0,
        golden=(Golden([0.6285317192117624, 0.14024438316608848, 0.23122389762214907], losses=[0.5, 2.0, 1.0]),),
    ),
    Row(
        "IGB",
        IGB,
        golden=(
            Golden([2.0, 0.5, 1.0], losses=[0.5, 2.0, 1.0]),
            Golden(
                [0.8414662989965309, 0.34683584643322357, 1.8855951576352872],
                losses=[0.5, 2.0, 1.0],
                state={"mean_loss": [1.0, 2.0, 0.5], "count": [2.0, 2.0, 2.0], "epoch": [7.0, 7.0, 7.0]},
            ),
        ),
    ),
    Row(
        "DBMTL",
        DBMTL,
        "norms",
        weighs_heads=False,
        golden=(
            Golden([2.0, 3.265986323710904, 3.316920957234622], losses=[0.5, 2.0, 1.0], rows=J2),
            Golden([2.0, 1.3764944032233706], losses=[0.5, 2.0], rows=J1),
        ),
    ),
    of_gramian(
        "SDMGrad",
        SDMGrad,
        total=1.0,
        unique=None,
        golden=(
            Golden([0.6, 0.4], rows=J1),
            Golden([0.07692307692307691, 0.4738034928676177, 0.44927343020930544], rows=J2),
        ),
    ),
    Row(
        "MetaBalance",
        functools.partial(MetaBalance, main="a"),
        "norms",
        weighs_heads=False,
        by_name=True,
        golden=(
            Golden([1.0, 1.4430952132988164, 1.4609223350321177], rows=J2),
            Golden([1.0, 0.7817730411281796], rows=J1),
        ),
    ),
    of_gramian(
        "AuxiliaryCosine",
        functools.partial(AuxiliaryCosine, main="a"),
        by_name=True,
        golden=(
            Golden([1.0, 0.1749635530559413, 0.5093842898610311], rows=J2),
            Golden([1.0, 0.0], rows=J1),
        ),
    ),
    of_gramian("Frozen", lambda: Frozen(MGDA(), steps=3), required=(MGDA(),), total=1.0, unique=False),
    of_gramian(
        "PIVRG",
        PIVRG,
        fits=False,  # not without baselines
        golden=(
            Golden([0.09750249240581733, 0.336121875269354, 0.3100707991912503], rows=J2),
            Golden(
                [0.08978070936557951, 0.37884209816306746, 0.2829082661119003],
                rows=J2,
                state={"drops": [0.0, 20.0, -5.0]},
            ),
        ),
    ),
    Row("ExcessMTL", ExcessMTL, "rows", total="K"),
)
