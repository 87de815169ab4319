"""Is a variant faster? Paired ratios of times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ivcp_eval.reports.stats.resampling import Interval

__all__ = ["TimeRatio", "time_ratio"]


@dataclass(frozen=True)
class TimeRatio:
    """Variant over baseline; above 1 the variant is slower.

    Attributes:
        ratio: geometric mean over the samples; NaN without any. interval: of it. n: samples.
    """

    ratio: float
    interval: Interval
    n: int

    @property
    def slower(self) -> bool:
        """Whether the whole interval lies above 1."""
        return self.interval.low > 1

    @property
    def faster(self) -> bool:
        """Whether the whole interval lies below 1."""
        return self.interval.high < 1


def time_ratio(variant: Sequence[float], baseline: Sequence[float], level: float = 0.95) -> TimeRatio:
    """The ratio of two times of the same samples, with a t interval on the logarithms of the samples' ratios.

    Args:
        variant, baseline: milliseconds of each sample, above 0, in the same order (`Timings.pairs`).

    Returns:
        The interval's ends are NaN for fewer than two samples.

    Raises:
        ValueError: unequal lengths, or a time that is not above 0.
    """
    if len(variant) != len(baseline):
        raise ValueError(f"paired times must have one length, got {len(variant)} and {len(baseline)}")
    if bad := [time for time in (*variant, *baseline) if not 0 < time < math.inf]:
        raise ValueError(f"a time is a number of milliseconds above 0, got {bad[0]!r}")
    n = len(variant)
    if not n:
        return TimeRatio(math.nan, Interval(math.nan, math.nan, level), 0)
    logs = [math.log(own / other) for own, other in zip(variant, baseline, strict=True)]
    mean = math.fsum(logs) / n
    if n == 1:
        return TimeRatio(math.exp(mean), Interval(math.nan, math.nan, level), 1)
    from scipy.special import stdtrit

    variance = math.fsum((value - mean) ** 2 for value in logs) / (n - 1)
    half = float(stdtrit(n - 1, (1 + level) / 2)) * math.sqrt(variance / n)
    return TimeRatio(math.exp(mean), Interval(math.exp(mean - half), math.exp(mean + half), level), n)
