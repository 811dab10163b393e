"""More rows of the contract's table: the schemes of physics-informed networks."""

from __future__ import annotations

import functools

from lightning_mtl.weighting import MGDA, GradNorm, LRAnnealing, NTKWeighting, ReLoBRaLo, Rotating, SoftAdapt
from tests.contract import J1, J2, Golden, Row

PHYSICS: tuple[Row, ...] = (
    Row(
        "SoftAdapt",
        functools.partial(SoftAdapt, 0.5),
        total=1.0,
        golden=(
            Golden([1 / 3, 1 / 3, 1 / 3], losses=[0.5, 2.0, 1.0]),
            Golden(
                [0.21872306959481305, 0.3182401884393924, 0.4630367419657945],
                losses=[0.5, 2.0, 1.0],
                state={"last": [1.5, 2.25, 0.5]},
            ),
        ),
    ),
    Row(
        "SoftAdapt",
        functools.partial(SoftAdapt, 2.0, loss_weighted=True, normalized=True),
        total=1.0,
        golden=(
            Golden(
                [0.09830985600423411, 0.492275710232476, 0.40941443376328984],
                losses=[0.5, 2.0, 1.0],
                state={"last": [1.5, 2.25, 0.5]},
            ),
        ),
    ),
    Row(
        "ReLoBRaLo",
        functools.partial(ReLoBRaLo, 0.9, 0.5, 1.0),
        total="K",
        golden=(
            Golden([1.0, 1.0, 1.0], losses=[0.5, 2.0, 1.0]),
            Golden(
                [1.3593547246072923, 0.4784171442094966, 1.1622281311832112],
                losses=[0.5, 2.0, 1.0],
                state={"last": [1.5, 2.25, 0.5], "first": [2.0, 4.0, 1.0], "weights": [1.5, 0.5, 1.0]},
            ),
        ),
    ),
    Row(
        "ReLoBRaLo",
        functools.partial(ReLoBRaLo, 0.9, 0.5, 0.0),
        total="K",
        golden=(
            Golden(
                [0.38801455915573124, 0.6527216677892992, 1.9592637730549698],
                losses=[0.5, 2.0, 1.0],
                state={"last": [1.5, 2.25, 0.5], "first": [2.0, 4.0, 1.0], "weights": [1.5, 0.5, 1.0]},
            ),
        ),
    ),
    Row("LRAnnealing", LRAnnealing, "rows"),
    Row(
        "NTKWeighting",
        NTKWeighting,
        fits=False,  # not without residuals
        golden=(
            Golden([3.111111111111111, 1.4736842105263157], rows=J1),
            Golden([1.7385714285714287, 4.636190476190476, 4.781925343811395], rows=J2),
            Golden(
                [1.5636082474226802, 3.1846719160104984, 21.528743789921926],
                rows=J2,
                state={"means": [20.0, 10.0, 1.0]},
            ),
        ),
    ),
    Row(
        "Rotating",
        lambda: Rotating(MGDA()),
        "gramian",
        weighs_heads=False,
        required=(MGDA(),),
        total=1.0,
        unique=False,
    ),
    Row("Rotating", lambda: Rotating(GradNorm(at="trunk")), "norms", required=(GradNorm(at="trunk"),), total="K"),
)
