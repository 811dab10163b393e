"""The metrics of multi-task learning are pure functions of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def delta_m(scores: Sequence[float], baselines: Sequence[float], higher_is_better: Sequence[bool]) -> float:
    r"""Compute the mean relative change against single-task baselines, in percent; negative is better.

    .. math:: \Delta_m = \frac{100}{M} \sum_{i=1}^{M} (-1)^{h_i} \frac{m_i - b_i}{|b_i|}

    with h_i = 1 where a higher score is better. Every metric counts the same, whichever task it belongs to.

    Args:
        scores: ``[M]``, the multi-task model's m_i.
        baselines: ``[M]``, the single-task models' b_i, none of them 0.
        higher_is_better: ``[M]``, h_i.

    Raises:
        ValueError: If the lengths differ, nothing is given, or a baseline is 0.

    Source: Maninis et al., Attentive Single-Tasking of Multiple Tasks, 2019, arXiv:1904.08918, and Vandenhende et al.,
    Multi-Task Learning for Dense Prediction Tasks, 2021, arXiv:2004.13379, which give the change the other sign; the
    sign here is that of the later literature (Liu et al., CAGrad, 2021, arXiv:2110.14048). They divide by b_i: the
    absolute value differs for negative scores alone, log-likelihoods for instance, whose changes would turn round.

    Example:
        >>> round(delta_m([0.9, 2.2], [1.0, 2.0], [True, False]), 6)
        10.0
    """
    if not len(scores) == len(baselines) == len(higher_is_better) or not len(scores):
        raise ValueError(
            f"delta_m needs as many scores as baselines and directions, at least one of each; found {len(scores)}, "
            f"{len(baselines)} and {len(higher_is_better)}."
        )
    if 0 in baselines:
        raise ValueError(f"delta_m divides by the baselines, and one of {list(baselines)} is 0; leave that metric out.")
    changes = [
        (baseline - score if higher else score - baseline) / abs(baseline)
        for score, baseline, higher in zip(scores, baselines, higher_is_better, strict=True)
    ]
    return 100 * sum(changes) / len(changes)


def transfer_gain(scores: Sequence[float], baselines: Sequence[float], higher_is_better: Sequence[bool]) -> float:
    r"""Compute what one task gained from the others, in percent of its scores when trained alone; positive is better.

    .. math:: g_k = \frac{100}{M_k} \sum_{i=1}^{M_k} (-1)^{1 - h_i} \frac{m_i - b_i}{|b_i|}

    over the task's own metrics i: :func:`delta_m` of one task, with the sign that the word gain has. Below zero the
    others have hurt it, which is negative transfer. The mean of the gains over tasks is -delta_m where all tasks have
    the same number of metrics.

    Args:
        scores: ``[M_k]``, the task's scores in the multi-task model.
        baselines: ``[M_k]``, its scores when trained alone, none of them 0.
        higher_is_better: ``[M_k]``, h_i.

    Raises:
        ValueError: If the lengths differ, nothing is given, or a baseline is 0.

    Example:
        >>> round(transfer_gain([0.9], [1.0], [True]), 6)
        -10.0
    """
    return 0.0 - delta_m(scores, baselines, higher_is_better)


def mean_rank(scores: Sequence[Sequence[float]], higher_is_better: Sequence[bool]) -> list[float]:
    r"""Rank the methods on each metric, 1 being best, and average each method's ranks over the metrics.

    .. math:: R_a = \frac{1}{M} \sum_{i=1}^{M} \mathrm{rank}_i(a)

    Methods with the same score share the mean of the ranks that they take up: two that are best get 1.5 each
    (``scipy.stats.rankdata`` with ``"average"``), so that the ranks of a metric always add up to A (A + 1) / 2.

    Args:
        scores: ``[A, M]``, a row for each method.
        higher_is_better: ``[M]``, whether a higher score is better.

    Returns:
        ``[A]``, each method's mean rank.

    Raises:
        ValueError: If the lengths differ, nothing is given, or a score is not a number.

    Source: Navon et al., Nash-MTL, 2022, arXiv:2202.01017, as ``MR``. No rule reproduces every rank published there
    from the scores published there: in the table of NYUv2, where no two methods tie, 6 of 11 follow from the scores,
    and the others are one place off in one metric or two. A rank also depends on which methods are compared: adding
    one can swap two others.

    Example:
        >>> mean_rank([[0.9, 0.3], [0.9, 0.2], [0.8, 0.1]], [True, False])
        [2.25, 1.75, 2.0]
    """
    lengths = {len(row) for row in scores}
    if lengths != {len(higher_is_better)} or not len(higher_is_better):
        raise ValueError(
            f"mean_rank needs a row of scores for each method, one score for each of {len(higher_is_better)} "
            f"directions; found rows of {sorted(lengths)} scores."
        )
    table = np.asarray(scores, dtype=np.float64)
    if np.isnan(table).any():
        row, column = np.argwhere(np.isnan(table))[0].tolist()
        raise ValueError(
            f"mean_rank cannot place what is not a number: metric {column} of method {row}; leave the metric out."
        )
    from scipy.stats import rankdata  # here, since scipy.stats takes a second to import

    ascending = np.where(np.asarray(higher_is_better), -table, table)
    ranks: list[float] = rankdata(ascending, method="average", axis=0).mean(axis=1).tolist()
    return ranks


class Interval(NamedTuple):
    """Holds a mean and its confidence interval; the ends are nan where one value alone gives no interval.

    Args:
        mean: The mean.
        low: The interval's lower end.
        high: Its upper end.

    Example:
        >>> Interval(2.0, 1.0, 3.0).beyond_noise
        True
    """

    mean: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Return whether zero lies outside of the interval."""
        return self.low > 0 or self.high < 0


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, num_resamples: int = 9999, seed: int = 0
) -> Interval:
    """Estimate the mean over seeds and its percentile bootstrap interval.

    The values are drawn n times with replacement, ``num_resamples`` times over, and the interval holds the middle
    ``confidence`` of the means (``scipy.stats.bootstrap`` with ``"percentile"``; bias correction needs more values than
    there are seeds). It is always the same for the same values.

    With few seeds it is too narrow, since it cannot leave the range of the values. Simulated with normal values, an
    interval meant to hold the true mean in 95 % of all cases holds it in 50 % with 2 values, 76 % with 3, 84 % with 5,
    90 % with 10 and 94 % with 20.

    Args:
        values: ``[n]``, one a seed.
        confidence: The share of the means inside, between 0 and 1.
        num_resamples: How often to draw.
        seed: Where the random draws begin.

    Returns:
        Mean, lower and upper end; with one value the ends are not numbers.

    Raises:
        ValueError: If there is no value, or an argument is out of its range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993.

    Example:
        >>> mean, low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0])
        >>> mean, 1.0 < low < 2.0, 3.0 < high < 4.0
        (2.5, True, True)
    """
    if not len(values):
        raise ValueError("bootstrap_interval needs a value for each seed, found none.")
    if not 0 < confidence < 1:
        raise ValueError(f"bootstrap_interval(confidence={confidence}) must lie between 0 and 1.")
    if num_resamples < 1:
        raise ValueError(f"bootstrap_interval(num_resamples={num_resamples}) must be at least 1.")
    mean = math.fsum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan)
    from scipy.stats import bootstrap  # here, since scipy.stats takes a second to import

    drawn = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=num_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(drawn.low), float(drawn.high))


def paired_bootstrap_interval(
    values: Sequence[float],
    others: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    r"""Estimate the mean difference of two methods that were run with the same seeds, and its bootstrap interval.

    .. math:: \frac{1}{n} \sum_{s=1}^{n} (x_s - y_s)

    Seeds are drawn, and each brings both of its values: what a seed does to both methods, an easy split for instance,
    cancels. As narrow with few seeds as :func:`bootstrap_interval`, which is applied to the differences.

    Args:
        values: ``[n]``, x, one a seed.
        others: ``[n]``, y, of the same seeds in the same order.
        confidence: The share of the mean differences inside, between 0 and 1.
        num_resamples: How often to draw.
        seed: Where the random draws begin.

    Raises:
        ValueError: If the numbers of values differ, there is none, or an argument is out of its range.

    Example:
        >>> paired_bootstrap_interval([1.0, 5.0, 9.0], [0.0, 4.0, 8.0])
        Interval(mean=1.0, low=1.0, high=1.0)
    """
    if len(values) != len(others):
        raise ValueError(
            f"paired_bootstrap_interval needs two values for each seed, found {len(values)} and {len(others)}."
        )
    differences = [value - other for value, other in zip(values, others, strict=True)]
    return bootstrap_interval(differences, confidence=confidence, num_resamples=num_resamples, seed=seed)
