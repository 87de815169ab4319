"""Paired ratios of times, against numbers worked out by hand."""

from __future__ import annotations

import math
from statistics import mean, stdev

import pytest

from ivcp_eval.reports.stats.times import time_ratio


def test_the_interval_is_students_on_the_logarithms() -> None:
    variant, baseline = [110.0, 95.0, 130.0, 102.0], [100.0, 100.0, 100.0, 100.0]
    found = time_ratio(variant, baseline)
    logs = [math.log(v / 100) for v in variant]
    half = 3.182446305 * stdev(logs) / 2  # t quantile of 0.975 with 3 degrees of freedom, from a printed table
    assert found.ratio == pytest.approx(math.exp(mean(logs)))
    assert found.interval.low == pytest.approx(math.exp(mean(logs) - half), rel=1e-6)
    assert found.interval.high == pytest.approx(math.exp(mean(logs) + half), rel=1e-6)
    assert found.n == 4
    assert not found.slower
    assert not found.faster


def test_drift_that_both_share_cancels() -> None:
    baseline = [100.0, 400.0, 50.0, 900.0]
    found = time_ratio([0.8 * time for time in baseline], baseline)
    assert found.ratio == pytest.approx(0.8)
    assert found.interval.high - found.interval.low < 1e-9
    assert found.faster
    assert time_ratio(baseline, [0.8 * time for time in baseline]).slower


def test_too_few_samples_have_no_interval() -> None:
    none, one = time_ratio([], []), time_ratio([2.0], [1.0])
    assert math.isnan(none.ratio)
    assert (none.n, one.n, one.ratio) == (0, 1, 2.0)
    assert not one.interval.defined
    assert not one.slower


@pytest.mark.parametrize(("variant", "baseline", "words"), [([1.0], [1.0, 2.0], "1 and 2"), ([0.0], [1.0], "above 0")])
def test_bad_times_are_refused(variant: list[float], baseline: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        time_ratio(variant, baseline)
