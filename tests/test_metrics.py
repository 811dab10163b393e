"""delta_m, gains, ranks and intervals against published values, scipy and slow obvious computations."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from lightning_mtl.metrics import (
    Interval,
    bootstrap_interval,
    delta_m,
    mean_rank,
    paired_bootstrap_interval,
    transfer_gain,
)

# NYUv2, MTAN on SegNet: mIoU, pixel accuracy; absolute and relative depth error; mean and median angle of the normals,
# share of them within 11.25, 22.5 and 30 degrees. From the NYUv2 table of Navon et al., Nash-MTL, 2022,
# arXiv:2202.01017, and, for the methods that came later (from FAMO, arXiv:2306.03792, on), from the NYUv2 tables of
# their own papers, which continue it with the same baselines. The last number is the published delta_m.
HIGHER = (True, True, False, False, False, False, True, True, True)
SINGLE = (38.30, 63.76, 0.6754, 0.2780, 25.01, 19.21, 30.14, 57.20, 69.15)
PUBLISHED = {
    "LS": ((39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08), 5.59),
    "SI": ((38.45, 64.27, 0.5354, 0.2201, 27.60, 23.37, 22.53, 48.57, 62.32), 4.39),
    "RLW": ((37.17, 63.77, 0.5759, 0.2410, 28.27, 24.18, 22.26, 47.05, 60.62), 7.78),
    "DWA": ((39.11, 65.31, 0.5510, 0.2285, 27.61, 23.18, 24.17, 50.18, 62.39), 3.57),
    "UW": ((36.87, 63.17, 0.5446, 0.2260, 27.04, 22.61, 23.54, 49.05, 63.65), 4.05),
    "MGDA": ((30.47, 59.90, 0.6070, 0.2555, 24.88, 19.45, 29.18, 56.88, 69.36), 1.38),
    "PCGrad": ((38.06, 64.64, 0.5550, 0.2325, 27.41, 22.80, 23.86, 49.83, 63.14), 3.97),
    "GradDrop": ((39.39, 65.12, 0.5455, 0.2279, 27.48, 22.96, 23.38, 49.44, 62.87), 3.58),
    "CAGrad": ((39.79, 65.49, 0.5486, 0.2250, 26.31, 21.58, 25.61, 52.36, 65.58), 0.20),
    "IMTL-G": ((39.35, 65.60, 0.5426, 0.2256, 26.02, 21.19, 26.20, 53.13, 66.24), -0.76),
    "Nash-MTL": ((40.13, 65.93, 0.5261, 0.2171, 25.26, 20.08, 28.40, 55.47, 68.15), -4.04),
    "FAMO": ((38.88, 64.90, 0.5474, 0.2194, 25.06, 19.57, 29.21, 56.61, 68.98), -4.10),
    "MoCo": ((40.30, 66.07, 0.5575, 0.2135, 26.67, 21.83, 25.61, 51.78, 64.85), 0.16),
    "Aligned-MTL": ((40.15, 66.05, 0.5520, 0.2291, 25.37, 19.89, 28.30, 55.29, 67.95), -3.12),
    "SDMGrad": ((40.47, 65.90, 0.5225, 0.2084, 25.07, 19.99, 28.54, 55.74, 68.53), -4.84),
    "DB-MTL": ((41.42, 66.45, 0.5251, 0.2160, 25.03, 19.50, 28.72, 56.17, 68.73), -5.36),
    "STCH": ((41.35, 66.07, 0.4965, 0.2010, 26.55, 21.81, 24.84, 51.39, 64.86), -1.35),
    "FairGrad": ((39.74, 66.01, 0.5377, 0.2236, 24.84, 19.60, 29.26, 56.58, 69.16), -4.66),
    "GO4Align": ((40.42, 65.37, 0.5492, 0.2167, 24.76, 18.94, 30.54, 57.87, 69.84), -6.08),
}
# The column MR of the same table of Nash-MTL's, which compares these methods.
PUBLISHED_RANKS = {
    "LS": 8.11,
    "SI": 7.11,
    "RLW": 10.11,
    "DWA": 6.88,
    "UW": 6.44,
    "MGDA": 5.44,
    "PCGrad": 6.88,
    "GradDrop": 6.44,
    "CAGrad": 3.77,
    "IMTL-G": 3.11,
    "Nash-MTL": 1.55,
}


@pytest.mark.parametrize("method", [name for name in PUBLISHED if name != "IMTL-G"])
def test_delta_m_is_the_published_one(method: str) -> None:
    scores, published = PUBLISHED[method]
    assert delta_m(scores, SINGLE, HIGHER) == pytest.approx(published, abs=0.02)


def test_imtl_g_is_published_with_another_delta_m_than_its_scores_give() -> None:
    scores, published = PUBLISHED["IMTL-G"]
    assert abs(delta_m(scores, SINGLE, HIGHER) - published) > 0.1


def test_published_ranks_follow_from_the_published_scores_for_six_methods_of_eleven() -> None:
    table = [PUBLISHED[name][0] for name in PUBLISHED_RANKS]
    ranks = mean_rank(table, HIGHER)
    signed = np.where(HIGHER, -np.array(table), np.array(table))
    for method in ("average", "min", "max", "dense", "ordinal"):  # no two methods tie: all rules agree
        np.testing.assert_allclose(rankdata(signed, method=method, axis=0).mean(1), ranks)
    agree = [abs(rank - published) < 0.012 for rank, published in zip(ranks, PUBLISHED_RANKS.values(), strict=True)]
    assert sum(agree) == 6
    for rank, published in zip(ranks, PUBLISHED_RANKS.values(), strict=True):
        assert rank == pytest.approx(published, abs=1.01 / 9 + 0.011)


def test_mean_rank_counts_the_methods_that_are_better_and_half_of_those_that_tie() -> None:
    scores = np.random.default_rng(0).integers(3, size=(6, 5)).astype(float)
    higher = [True, False, True, True, False]
    expected = []
    for own in scores:
        ranks = [
            1
            + sum(other[i] > own[i] if up else other[i] < own[i] for other in scores)
            + (sum(other[i] == own[i] for other in scores) - 1) / 2
            for i, up in enumerate(higher)
        ]
        expected.append(sum(ranks) / len(ranks))
    assert mean_rank(scores.tolist(), higher) == pytest.approx(expected)


def test_mean_rank_refuses_what_it_cannot_place() -> None:
    with pytest.raises(ValueError, match=r"for each of 2 directions; found rows of \[1, 2\] scores"):
        mean_rank([[1.0, 2.0], [1.0]], [True, False])
    with pytest.raises(ValueError, match=r"0 directions; found rows of \[\]"):
        mean_rank([], [])
    with pytest.raises(ValueError, match="metric 1 of method 0"):
        mean_rank([[1.0, math.nan], [1.0, 2.0]], [True, False])


def test_a_gain_is_what_delta_m_is_not() -> None:
    assert transfer_gain([0.9, 2.2], [1.0, 2.0], [True, False]) == pytest.approx(-10)
    gains = [transfer_gain([0.6], [0.5], [True]), transfer_gain([3.0], [2.0], [False])]
    assert gains == pytest.approx([20, -50])
    assert delta_m([0.6, 3.0], [0.5, 2.0], [True, False]) == pytest.approx(-sum(gains) / 2)


def test_a_change_of_a_negative_score_keeps_its_direction() -> None:
    assert delta_m([-3.0], [-2.0], [False]) == pytest.approx(-50)  # a log-likelihood loss that fell
    assert delta_m([-3.0], [-2.0], [True]) == pytest.approx(50)


def test_the_interval_is_that_of_all_resamples_one_by_one() -> None:
    values = [0.1, 0.7, 0.2, 1.5]
    means = [sum(drawn) / 4 for drawn in itertools.product(values, repeat=4)]
    mean, low, high = bootstrap_interval(values, confidence=0.8, num_resamples=20000)
    assert mean == pytest.approx(sum(values) / 4)
    assert low == pytest.approx(np.quantile(means, 0.1), abs=0.03)
    assert high == pytest.approx(np.quantile(means, 0.9), abs=0.03)


def test_the_interval_is_the_same_again_and_wider_with_more_confidence() -> None:
    values = [0.1, 0.7, 0.2, 1.5, -0.3]
    narrow, wide = bootstrap_interval(values, confidence=0.5), bootstrap_interval(values, confidence=0.99)
    assert narrow == bootstrap_interval(values, confidence=0.5)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_pairs_take_out_what_seeds_do_to_both() -> None:
    generator = np.random.default_rng(1)
    easy = generator.normal(scale=10, size=8)
    better, worse = easy + 1 + 0.1 * generator.normal(size=8), easy
    paired = paired_bootstrap_interval(better.tolist(), worse.tolist())
    assert paired.beyond_noise
    assert paired.mean == pytest.approx(1, abs=0.2)
    assert paired.high - paired.low < 0.3
    assert bootstrap_interval(better.tolist()).high - bootstrap_interval(better.tolist()).low > 5


def test_pairs_have_the_interval_of_their_differences_with_the_same_arguments() -> None:
    values, others = [0.1, 0.7, 0.2, 1.5, -0.3], [0.3, 0.1, 0.9, 0.4, 0.0]
    differences = [value - other for value, other in zip(values, others, strict=True)]
    arguments: dict[str, Any] = {"confidence": 0.5, "num_resamples": 99, "seed": 3}
    assert paired_bootstrap_interval(values, others, **arguments) == bootstrap_interval(differences, **arguments)


def test_the_coverage_with_few_seeds_is_what_the_docstring_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        _, low, high = bootstrap_interval(generator.normal(size=5).tolist(), num_resamples=999)
        hits += low <= 0 <= high
    assert pytest.approx(hits / 200, abs=0.08) == 0.84


def test_one_seed_has_no_interval() -> None:
    found = bootstrap_interval([2.0])
    assert found.mean == 2
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.beyond_noise
    assert Interval(-1.0, -2.0, -0.5).beyond_noise


def test_arguments_of_the_intervals() -> None:
    with pytest.raises(ValueError, match="a value for each seed, found none"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match=r"confidence=95.* between 0 and 1"):
        bootstrap_interval([1.0, 2.0], confidence=95)
    with pytest.raises(ValueError, match=r"num_resamples=0.* at least 1"):
        bootstrap_interval([1.0, 2.0], num_resamples=0)
    with pytest.raises(ValueError, match="two values for each seed, found 2 and 1"):
        paired_bootstrap_interval([1.0, 2.0], [1.0])
