"""Whether methods run with the same seeds differ: Student's t of the differences, corrected for their number."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from lightning_mtl.metrics import Interval

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """A method less another: the mean over seeds with its 95 % interval, and p, alone and after Holm's correction."""

    interval: Interval
    p: float
    p_corrected: float

    @property
    def significant(self) -> bool:
        """Whether it holds among all comparisons that were made with it."""
        return self.p_corrected < LEVEL


def t_interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval; without ends for one value.

    For five seeds the bootstrap's interval, which cannot leave the range of the values, would hold the mean in 84 % of
    all cases; this one holds it in 95 % where the values are normal.
    """
    mean = statistics.mean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    margin = float(student.ppf(1 - LEVEL / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - margin, mean + margin)


def p_value(differences: Sequence[float]) -> float:
    """Two-sided, of the mean being 0; 1 where there is nothing to tell it from."""
    if len(differences) < 2:
        return 1.0
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(student.sf(abs(mean) / error, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct for the number of comparisons: the chance of one false finding or more stays below the level.

    Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979: the i-th smallest of m counts m - i + 1 times,
    and none counts less than a smaller one.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def compare(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, Difference]:
    """Each method less the reference, seed by seed."""
    differences = {
        name: [value - base for value, base in zip(found, values[reference], strict=True)]
        for name, found in values.items()
        if name != reference
    }
    alone = [p_value(found) for found in differences.values()]
    return {
        name: Difference(t_interval(found), p, corrected)
        for (name, found), p, corrected in zip(differences.items(), alone, holm(alone), strict=True)
    }
