"""Small convex problems over the K x K Gramian of the task gradients: NumPy float64 in and out."""

from lightning_mtl.solvers.cagrad import cagrad_weights
from lightning_mtl.solvers.dual_cone import project_on_dual_cone, project_rows_on_dual_cone
from lightning_mtl.solvers.equal_projections import equal_projection_weights
from lightning_mtl.solvers.errors import SolverError
from lightning_mtl.solvers.fairgrad import fairgrad_weights
from lightning_mtl.solvers.min_norm import min_norm_weights
from lightning_mtl.solvers.nash import nash_weights
from lightning_mtl.solvers.stationary import Solution, is_stationary

__all__ = [
    "Solution",
    "SolverError",
    "cagrad_weights",
    "equal_projection_weights",
    "fairgrad_weights",
    "is_stationary",
    "min_norm_weights",
    "nash_weights",
    "project_on_dual_cone",
    "project_rows_on_dual_cone",
]
