"""The rows of ``units.py``, and how each comes to its learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.units_problems import Optimizer, Problem
from lightning_mtl import Weighting
from lightning_mtl import weighting as methods
from lightning_mtl.transfer.finished import TaskScores
from lightning_mtl.tuning.comparing.plan import Candidate, Line, Training, search
from lightning_mtl.tuning.comparing.rows import fixed_weights

EQUAL, INITIAL, STANDARDIZED, TUNED = "equal weights", "1 / L(0)", "standardized", "fixed weights, tuned"
SIMPLEX, DECADES = "fixed weights, uniform", "fixed weights, over decades"
TUNING_SEED = 100
MOST_RATES = 12
ERROR = {"all": {"error": False}}  # one score, of which less is better


@dataclass(frozen=True)
class Row:
    """One way of weighing.

    Args:
        make: Its weighting; None for equal weights.
        divided: Whether each loss is divided by its first value.
        standardized: Whether targets are standardized: a factor of the unit is then not in the loss.
        optimizers: What it trains with.
    """

    name: str
    make: Callable[[Problem[Any]], Weighting | None] = lambda _: None
    divided: bool = False
    standardized: bool = False
    optimizers: tuple[Optimizer, ...] = ("Adam",)


ROWS = (
    Row(EQUAL, optimizers=("Adam", "SGD")),
    Row(INITIAL, divided=True),
    Row(STANDARDIZED, standardized=True, optimizers=("Adam", "SGD")),
    Row("UncertaintyWeighting", lambda p: methods.UncertaintyWeighting(p.kinds)),
    Row("DWA", lambda _: methods.DWA()),
    Row("FAMO", lambda _: methods.FAMO()),
    Row("ScaleInvariant", lambda _: methods.ScaleInvariant()),
    Row("IMTLL", lambda _: methods.IMTLL()),
    Row("NashMTL", lambda p: methods.NashMTL(every_n_steps=p.every_n_steps), optimizers=("Adam", "SGD")),
    Row("MGDA", lambda p: methods.MGDA(every_n_steps=p.every_n_steps)),
    Row("CAGrad", lambda p: methods.CAGrad(every_n_steps=p.every_n_steps)),
    Row("AlignedMTL", lambda p: methods.AlignedMTL(every_n_steps=p.every_n_steps)),
    Row("GLS", lambda _: methods.GLS()),
    Row("CoVWeighting", lambda _: methods.CoVWeighting()),
    Row("SoftOptimalUncertainty", lambda _: methods.SoftOptimalUncertainty()),
    Row("RLW", lambda _: methods.RLW()),
    Row("LBTW", lambda _: methods.LBTW()),
    Row("SoftAdapt", lambda _: methods.SoftAdapt(normalized=True)),
    Row("ReLoBRaLo", lambda _: methods.ReLoBRaLo()),
)


def drawn(kind: str, problem: Problem[Any], draws: int) -> list[dict[str, float]]:
    """Sets of fixed weights that sum to K, always the same: uniform on the simplex, or over six decades.

    More draws begin with the same sets.
    """
    if kind == SIMPLEX:
        return fixed_weights(list(problem.tasks), draws)
    generator = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        weights = 10 ** generator.uniform(-3, 3, len(problem.tasks))
        found.append(dict(zip(problem.tasks, (len(weights) * weights / weights.sum()).tolist(), strict=True)))
    return found


def choose(
    name: str, rates: tuple[float, ...], variants: int, error: Callable[[Training], float]
) -> tuple[Candidate, float]:
    """Choose a row's learning rate, and set of weights, by the error on validation data of a seed of its own.

    A choice at the edge of the grid widens it, as :func:`lightning_mtl.tuning.compare` does it; with a single variant
    up to twelve rates.

    Args:
        name: The row's.
        rates: To begin with, ascending.
        variants: How many sets of weights there are.
        error: Trains, or remembers.

    Returns:
        The choice, and its error.
    """
    line, known = Line(name, ERROR, variants), dict[str, TaskScores | None]()
    while True:
        found = search(line, rates, TUNING_SEED, known)
        known |= {one.key: {"all": {"error": error(one)}} for one in found.trainings if one.key not in known}
        choice = found.choice
        if choice is None or choice.candidate is None:  # which is never: a training that diverged has an error, too
            continue
        if choice.edge and variants == 1 and len(choice.tried) < MOST_RATES:
            rates = choice.tried
            continue
        return choice.candidate, min(error(one) for one in found.trainings if one.candidate == choice.candidate)
