"""Statistics of paired seeds, against SciPy and by hand."""

from __future__ import annotations

import math

import pytest
from scipy.stats import ttest_1samp, ttest_rel

from lightning_mtl.paired import compare, compare_with_zero, holm, t_interval


def test_intervals_and_p_values_are_scipys() -> None:
    values = {"a": [1.0, 2.5, 2.0, 4.0, 3.0], "b": [0.5, 2.6, 1.0, 3.0, 2.5]}
    found = compare(values, "b")["a"]
    expected = ttest_rel(values["a"], values["b"])
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(float(expected.pvalue))
    assert found.p_corrected == pytest.approx(found.p)  # one comparison, nothing to correct
    assert found.interval == pytest.approx((0.58, float(interval.low), float(interval.high)))
    alone = ttest_1samp(values["a"], 0).confidence_interval(0.95)
    assert t_interval(values["a"])[1:] == pytest.approx((float(alone.low), float(alone.high)))


def test_holm_counts_smaller_p_values_more_often() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_what_is_alike_or_alone_is_not_significant() -> None:
    assert not compare({"a": [1.0, 2.0], "b": [1.0, 2.0]}, "b")["a"].significant
    single = compare({"a": [1.0], "b": [5.0]}, "b")["a"]
    assert not single.significant
    assert math.isnan(single.interval.low)


def test_a_method_without_differences_is_not_counted_by_the_correction() -> None:
    found = compare_with_zero({"a": [1.0, 2.0, 1.5], "lost": [], "b": [3.0, 1.0, 0.5]})
    assert math.isnan(found["lost"].interval.mean)
    assert found["lost"].p == 1.0
    p = float(ttest_1samp([1.0, 2.0, 1.5], 0).pvalue)
    assert found["a"].p_corrected == pytest.approx(2 * p)
