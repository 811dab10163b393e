"""Searches over weightings and hyperparameters, and comparisons of methods, on Optuna; with the extra ``tune``."""

try:
    import optuna  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"lightning_mtl.tuning needs {error.name}; install what the extra tune brings: "
        "pip install optuna sqlalchemy 'jsonargparse[signatures]' rich matplotlib."
    ) from error

from lightning_mtl.method.search_space import Choice, Range
from lightning_mtl.tuning.comparing import Comparison, Setup, compare
from lightning_mtl.tuning.result import Result
from lightning_mtl.tuning.search import tune

__all__ = ["Choice", "Comparison", "Range", "Result", "Setup", "compare", "tune"]
