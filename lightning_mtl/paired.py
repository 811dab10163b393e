"""Statistics of methods that were run with the same seeds: Student's t of the differences, Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_mtl.metrics import Interval

LEVEL = 0.05


@dataclass(frozen=True)
class Difference:
    """Holds a method less another: the mean with its 95 % interval, and p, alone and after Holm's correction.

    Args:
        interval: The mean difference and its interval.
        p: Two-sided, of this comparison alone.
        p_corrected: After the correction for all comparisons that were made with it.
    """

    interval: Interval
    p: float
    p_corrected: float

    @property
    def significant(self) -> bool:
        """Return whether it holds among all comparisons that were made with it."""
        return self.p_corrected < LEVEL

    @property
    def p_text(self) -> str:
        """Return the corrected p to three digits, on its side of the level.

        Example:
            >>> Difference(Interval(1.0, 0.5, 1.5), 1e-5, 4e-5).p_text
            '< 0.001'
            >>> Difference(Interval(1.0, 0.5, 1.5), 0.01, 0.0499).p_text
            '< 0.050'
        """
        if self.p_corrected < 0.001:
            return "< 0.001"
        text = f"{self.p_corrected:.3f}"
        return text if text != f"{LEVEL:.3f}" else f"{'<' if self.significant else '≥'} {text}"


def t_interval(values: Sequence[float]) -> Interval:
    r"""Estimate the mean and its 95 % interval of Student's t; without ends for one value, all nan for none.

    .. math:: \bar x \pm t_{0.975, n - 1}\, s / \sqrt{n}

    For five seeds the bootstrap's interval, which cannot leave the range of the values, would hold the mean in 84 % of
    all cases; this one holds it in 95 % where the values are normal.

    Args:
        values: ``[n]``, one a seed.

    Example:
        >>> [round(end, 3) for end in t_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    mean = statistics.mean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    from scipy.stats import t as student  # here, since scipy.stats takes a second to import

    margin = float(student.ppf(1 - LEVEL / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - margin, mean + margin)


def p_value(differences: Sequence[float]) -> float:
    """Compute the two-sided p of the mean being 0, by Student's t; 1 where there is nothing to tell it from.

    Example:
        >>> round(p_value([1.0, 2.0, 3.0]), 3)
        0.074
    """
    if len(differences) < 2:
        return 1.0
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.stats import t as student

    return 2 * float(student.sf(abs(mean) / error, len(differences) - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct for the number of comparisons: the chance of one false finding or more stays below the level.

    The i-th smallest of m counts m - i + 1 times, and none counts less than a smaller one.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.

    Example:
        >>> holm([0.01, 0.5, 0.02])
        [0.03, 0.5, 0.04]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def compare(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, Difference]:
    """Compare each method with the reference, seed by seed: its values less the reference's.

    Example:
        >>> compare({"equal": [1.0, 2.0], "other": [2.0, 3.5]}, "equal")["other"].interval.mean
        1.25
    """
    return compare_with_zero(
        {
            name: [value - base for value, base in zip(found, values[reference], strict=True)]
            for name, found in values.items()
            if name != reference
        }
    )


def compare_with_zero(differences: Mapping[str, Sequence[float]]) -> dict[str, Difference]:
    """Test each method's differences, one a seed, and correct for the number of methods; they may have other seeds.

    A method without differences has no interval, and is not counted.
    """
    tested = [name for name, found in differences.items() if found]
    alone = [p_value(differences[name]) for name in tested]
    corrected = dict(zip(tested, zip(alone, holm(alone), strict=True), strict=True))
    return {
        name: Difference(t_interval(found), *corrected.get(name, (1.0, 1.0))) for name, found in differences.items()
    }
