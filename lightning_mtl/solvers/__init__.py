"""Small convex problems over the K x K Gramian are solved here: NumPy float64 in and out."""

from lightning_mtl.solvers.barrier import alpha_fair_weights
from lightning_mtl.solvers.dual_cone import project_on_dual_cone, project_rows_on_dual_cone
from lightning_mtl.solvers.equal_projections import equal_projection_weights
from lightning_mtl.solvers.gramian import Solution, SolverError, is_stationary, min_norm_weights

__all__ = [
    "Solution",
    "SolverError",
    "alpha_fair_weights",
    "equal_projection_weights",
    "is_stationary",
    "min_norm_weights",
    "project_on_dual_cone",
    "project_rows_on_dual_cone",
]
