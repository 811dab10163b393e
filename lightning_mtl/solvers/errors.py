"""The error that a solver raises instead of returning weights that it could not vouch for."""


class SolverError(RuntimeError):
    """A solver over the Gramian did not converge.

    Args:
        solver: Name of the function that failed.
        num_tasks: Number of rows K of the Gramian.
        iterations: Iterations spent.
        residual: What was left of the optimality condition, relative; ``nan`` where the solver could not tell.

    Example:
        >>> print(SolverError("min_norm_weights", num_tasks=3, iterations=130, residual=0.5))
        min_norm_weights did not converge on a Gramian of K=3 tasks: residual 0.5 after 130 iterations.
    """

    def __init__(self, solver: str, *, num_tasks: int, iterations: int, residual: float) -> None:
        super().__init__(
            f"{solver} did not converge on a Gramian of K={num_tasks} tasks: "
            f"residual {residual:.3g} after {iterations} iterations."
        )
        self.solver = solver
        self.num_tasks = num_tasks
        self.iterations = iterations
        self.residual = residual
