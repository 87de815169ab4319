"""How sure are we? Paired, clustered statistics of a pruned model against its baseline.

Conventions: a difference is pruned minus baseline; retained is pruned / baseline. Scores are arrays (n,), one entry per
sample, the same samples in the same order for both. Samples of one cluster (questions about one image, rotations of
one question) are not independent, so clusters are resampled, not samples (Miller 2024, arXiv 2411.00640).
Everything random is seeded: equal input gives equal output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ivcp_eval.reports.stats.resampling import (
    Array,
    Interval,
    Paired,
    PairedResult,
    Sums,
    paired_bootstrap,
    paired_bootstraps,
)

__all__ = [
    "Flips",
    "Interval",
    "McNemar",
    "Paired",
    "PairedResult",
    "Sums",
    "UnpairedResult",
    "benjamini_hochberg",
    "discordance_standard_error",
    "flips",
    "holm",
    "mcnemar",
    "minimal_detectable_effect",
    "paired_bootstrap",
    "paired_bootstraps",
    "unpaired_interval",
]


@dataclass(frozen=True)
class McNemar:
    """Exact two-sided McNemar test: of the samples whose verdict changed, did more turn wrong than right?"""

    right_to_wrong: int
    wrong_to_right: int
    p_value: float


def mcnemar(baseline: ArrayLike, pruned: ArrayLike) -> McNemar:
    """Exact McNemar test of 0/1 scores (n,); it takes samples as independent, so it is for clusters of one sample.

    Raises:
        ValueError: scores other than 0 and 1, or unequal lengths.
    """
    from scipy import special

    before, after = np.asarray(baseline, dtype=np.float64), np.asarray(pruned, dtype=np.float64)
    if before.shape != after.shape:
        raise ValueError(f"baseline and pruned must have one length, got {before.shape} and {after.shape}")
    if not (np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all()):
        raise ValueError("McNemar's test needs scores 0 and 1; use paired_bootstrap for graded scores")
    lost, gained = int(np.sum(before > after)), int(np.sum(before < after))
    # Twice the smaller tail of Binomial(lost + gained, 1/2); both tails meet where the two are equal.
    p_value = min(1.0, 2 * float(special.bdtr(min(lost, gained), lost + gained, 0.5)))
    return McNemar(lost, gained, p_value)


@dataclass(frozen=True)
class Flips:
    """What happened to single answers; an average hides it.

    Attributes:
        right_to_wrong, wrong_to_right: samples whose score fell, rose; of several seeds the mean.
        answers_changed: samples whose answer text differs, right or wrong.
        n: samples compared.
        graded: some scores are neither 0 nor 1, so "right to wrong" reads "fell".
    """

    right_to_wrong: float
    wrong_to_right: float
    answers_changed: int
    n: int
    graded: bool


def flips(
    baseline: ArrayLike, pruned: ArrayLike, baseline_answers: Sequence[str], pruned_answers: Sequence[str]
) -> Flips:
    """Count flips; scores (n,) and answer texts (n,) of the same samples. Raises ValueError for unequal lengths."""
    before, after = np.asarray(baseline, dtype=np.float64), np.asarray(pruned, dtype=np.float64)
    if not before.size == after.size == len(baseline_answers) == len(pruned_answers):
        lengths = (before.size, after.size, len(baseline_answers), len(pruned_answers))
        raise ValueError(f"scores and answers must have one length, got {lengths}")
    changed = sum(a.strip() != b.strip() for a, b in zip(baseline_answers, pruned_answers, strict=True))
    graded = not (np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all())
    return Flips(int(np.sum(after < before)), int(np.sum(after > before)), changed, before.size, graded)


@dataclass(frozen=True)
class UnpairedResult:
    """Two totals, no samples. Much wider than a paired interval, because it cannot know what the two share."""

    difference: float
    difference_interval: Interval
    retained: float
    retained_interval: Interval
    standard_error: float
    p_value: float


def unpaired_interval(
    baseline: float, n_baseline: int, pruned: float, n_pruned: int, *, scale: float = 1.0, level: float = 0.95
) -> UnpairedResult:
    """Interval of a difference of two independent means of scores in [0, scale], from totals alone.

    Difference: Newcombe's hybrid score interval (1998, method 10). Ratio: normal interval of log(pruned / baseline)
    (Katz 1978). p: two-sided z test with pooled variance. All take scores as 0/1 and samples as independent, which is
    conservative for graded scores and too narrow for clustered samples.

    Raises:
        ValueError: a mean outside [0, scale], or fewer than one sample.
    """
    from scipy import special

    if n_baseline < 1 or n_pruned < 1:
        raise ValueError(f"an interval needs the numbers of samples, got {n_baseline} and {n_pruned}")
    p, q = baseline / scale, pruned / scale
    if not (0 <= p <= 1 and 0 <= q <= 1):
        raise ValueError(f"means must lie in [0, {scale:g}], got {baseline:g} and {pruned:g}")
    z = float(special.ndtri((1 + level) / 2))
    (low_p, high_p), (low_q, high_q) = _wilson(p, n_baseline, z), _wilson(q, n_pruned, z)
    low = q - p - math.hypot(q - low_q, high_p - p)
    high = q - p + math.hypot(high_q - q, p - low_p)
    pooled = (p * n_baseline + q * n_pruned) / (n_baseline + n_pruned)
    pooled_error = math.sqrt(pooled * (1 - pooled) * (1 / n_baseline + 1 / n_pruned))
    p_value = 2 * float(special.ndtr(-abs(q - p) / pooled_error)) if pooled_error else 1.0
    ratio_interval = Interval(math.nan, math.nan, level)
    if p and q:
        spread = math.exp(z * math.sqrt((1 - p) / (n_baseline * p) + (1 - q) / (n_pruned * q)))
        ratio_interval = Interval(q / p / spread, q / p * spread, level)
    return UnpairedResult(
        pruned - baseline,
        Interval(scale * low, scale * high, level),
        q / p if p else math.nan,
        ratio_interval,
        scale * math.sqrt(p * (1 - p) / n_baseline + q * (1 - q) / n_pruned),
        p_value,
    )


def _wilson(p: float, n: int, z: float) -> tuple[float, float]:
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def holm(p_values: ArrayLike) -> Array:
    """Holm's step-down adjusted p-values (family-wise error); NaN is no test and stays NaN."""

    def adjust(ordered: Array) -> Array:
        return np.maximum.accumulate(ordered * np.arange(ordered.size, 0, -1))

    return _adjusted(p_values, adjust)


def benjamini_hochberg(p_values: ArrayLike) -> Array:
    """Benjamini-Hochberg step-up adjusted p-values (false discovery rate); NaN is no test and stays NaN."""

    def adjust(ordered: Array) -> Array:
        raised = ordered * ordered.size / np.arange(1, ordered.size + 1)
        return np.minimum.accumulate(raised[::-1])[::-1]

    return _adjusted(p_values, adjust)


def _adjusted(p_values: ArrayLike, adjust: Callable[[Array], Array]) -> Array:
    values = np.asarray(p_values, dtype=np.float64)
    result = np.full(values.shape, math.nan)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    result[order] = np.minimum(adjust(values[order]), 1.0)
    return result


def discordance_standard_error(discordant_share: float, n: int) -> float:
    """Standard error of a paired difference of accuracies under H0: sqrt(discordant share / n)."""
    return math.sqrt(discordant_share / n)


def minimal_detectable_effect(standard_error: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided test at ``alpha`` finds with probability ``power``.

    In the unit of ``standard_error``; about 2.8 standard errors by default. NaN for a standard error of zero: nothing
    varied, so nothing is known about what could have been seen.
    """
    from scipy import special

    if not standard_error > 0:
        return math.nan
    return float(special.ndtri(1 - alpha / 2) + special.ndtri(power)) * standard_error
