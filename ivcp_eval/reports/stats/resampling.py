"""Paired cluster bootstrap and paired permutation test of a pruned model against its baseline.

Use them through `stats.py`, whose conventions hold here. A mean has a vectorised path; any other aggregate is called
once per resample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Aggregate", "Array", "Interval", "PairedResult", "Sample", "paired_bootstrap"]

Array = NDArray[np.float64]
FEW_CLUSTERS = 20
_CHUNK = 4_000_000  # resampled clusters held in memory at once
#: What scores and their means over a few seeds are multiples of; then every permutation can be counted.
_UNITS = tuple(1 / parts for parts in (1, 2, 3, 6, 10, 30, 100, 300))
_MOST_STEPS = 2_000_000_000
_Resampler = Callable[[np.random.Generator, int], tuple[Array, Array]]


@dataclass(frozen=True)
class Interval:
    """A confidence interval; both ends are NaN where it is undefined (``PairedResult.notes`` says why)."""

    low: float
    high: float
    level: float = 0.95

    @property
    def defined(self) -> bool:
        """Whether there is an interval at all."""
        return not (math.isnan(self.low) or math.isnan(self.high))


@dataclass(frozen=True)
class Sample:
    """What an aggregate is computed from; in a resample, clusters drawn twice stand in it twice.

    Attributes:
        scores: (n,) per-sample scores.
        clusters: (n,) cluster numbers 0..C-1, distinct for two draws of one cluster: group by them, never by an
            image name of `columns`, which would melt the draws into one.
        columns: further per-sample arrays (n,), e.g. ``category``.
    """

    scores: Array
    clusters: NDArray[np.int64]
    columns: Mapping[str, NDArray] = field(default_factory=dict)


Aggregate = Callable[[Sample], float]
"""A benchmark's own rule from per-sample scores to its score, e.g. MME's sum of accuracy and accuracy+."""


@dataclass(frozen=True)
class PairedResult:
    """A pruned model against its baseline on the same samples.

    Attributes:
        baseline, pruned: the aggregates.
        difference, difference_interval: pruned - baseline.
        retained, retained_interval: pruned / baseline; NaN if the baseline is zero.
        standard_error: bootstrap standard error of the difference.
        p_value: two-sided paired permutation test over clusters (H0: the two are exchangeable within a cluster). Exact
            for a mean of scores that are multiples of a common part (0 and 1, thirds, hundredths); else from as many
            random permutations as there are resamples, and never below 1 / (1 + resamples).
        n_samples, n_clusters: sizes.
        notes: what is undefined, or should be known when reading the interval.
    """

    baseline: float
    pruned: float
    difference: float
    difference_interval: Interval
    retained: float
    retained_interval: Interval
    standard_error: float
    p_value: float
    n_samples: int
    n_clusters: int
    notes: tuple[str, ...]


def paired_bootstrap(
    baseline: ArrayLike,
    pruned: ArrayLike,
    clusters: Sequence[object] | NDArray | None = None,
    *,
    aggregate: Aggregate | None = None,
    columns: Mapping[str, NDArray] | None = None,
    pruned_columns: Mapping[str, NDArray] | None = None,
    scale: float = 1.0,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedResult:
    """Paired cluster bootstrap of the difference and of the retained ratio, and a paired permutation test.

    The interval is Hesterberg's expanded percentile interval (arXiv 1411.5279, section 5.3): percentiles widened for
    the number of clusters, since plain ones are too narrow where there are few.

    Args:
        baseline, pruned: (n,) scores of the same samples in the same order.
        clusters: (n,) hashable cluster names; by default every sample is its own cluster.
        aggregate: from `Sample` to a score; by default the mean, which has a fast vectorised path.
        columns: per-sample arrays (n,) for `aggregate`.
        pruned_columns: those of the pruned model where they differ (its predictions); by default ``columns``.
        scale: factor on the default mean, e.g. 100 for percent.
        resamples: number of bootstrap resamples, and of permutations where these are drawn.
        level: confidence level.
        seed: of the random generator.

    Raises:
        ValueError: no samples, unequal lengths, scores that are not finite, a level outside (0, 1).
    """
    names = np.arange(np.size(baseline)) if clusters is None else np.asarray(clusters)
    before, after, ids = _checked(baseline, pruned, names, level)
    n_clusters = int(ids.max()) + 1
    columns = columns or {}
    pairs = (Sample(before, ids, columns), Sample(after, ids, pruned_columns or columns))
    if aggregate is None:
        rule: Aggregate = lambda sample: scale * float(sample.scores.mean())  # noqa: E731
        resample, permute = _mean_resamplers(before, after, ids, n_clusters, scale)
    else:
        rule = aggregate
        resample, permute = _general_resamplers(pairs, n_clusters, rule)
    moves = np.bincount(ids, weights=after - before, minlength=n_clusters).astype(np.float64)
    exact = _exact_p(moves) if aggregate is None else None
    of_baseline, of_pruned = rule(pairs[0]), rule(pairs[1])
    difference = of_pruned - of_baseline
    undefined = Interval(math.nan, math.nan, level)
    notes = []
    if of_baseline == 0:
        notes.append("the baseline score is zero: retained is undefined")
    retained = of_pruned / of_baseline if of_baseline != 0 else math.nan
    sizes = {"n_samples": before.size, "n_clusters": n_clusters}
    if n_clusters == 1:
        notes.append("one cluster only: no interval and no test")
        return PairedResult(
            of_baseline,
            of_pruned,
            difference,
            undefined,
            retained,
            undefined,
            math.nan,
            math.nan,
            **sizes,
            notes=(*notes,),
        )
    generator = np.random.default_rng(seed)
    drawn = resample(generator, resamples)
    differences = drawn[1] - drawn[0]
    difference_interval = _expanded_percentiles(differences, n_clusters, level)
    retained_interval = undefined
    zeros = int(np.count_nonzero(drawn[0] == 0))
    if of_baseline != 0 and zeros:
        notes.append(f"the baseline score is zero in {zeros} of {resamples} resamples: no interval of retained")
    elif of_baseline != 0:
        retained_interval = _expanded_percentiles(drawn[1] / drawn[0], n_clusters, level)
    notes += _interval_notes(before, after, n_clusters)
    if exact is None:
        swapped = permute(generator, resamples)
        tolerance = 1e-9 * max(1.0, abs(of_baseline), abs(of_pruned))
        as_extreme = int(np.count_nonzero(np.abs(swapped[1] - swapped[0]) >= abs(difference) - tolerance))
        exact = (1 + as_extreme) / (1 + resamples)
    return PairedResult(
        of_baseline,
        of_pruned,
        difference,
        difference_interval,
        retained,
        retained_interval,
        float(differences.std(ddof=1)),
        exact,
        **sizes,
        notes=tuple(notes),
    )


def _checked(
    baseline: ArrayLike, pruned: ArrayLike, names: NDArray, level: float
) -> tuple[Array, Array, NDArray[np.int64]]:
    before, after = np.asarray(baseline, dtype=np.float64), np.asarray(pruned, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape or names.shape != before.shape:
        shapes = f"{before.shape}, {after.shape} and {names.shape}"
        raise ValueError(f"baseline, pruned and clusters must be (n,) arrays of one length, got {shapes}")
    if before.size == 0:
        raise ValueError("no samples: a comparison needs at least one")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("scores must be finite; leave samples without a score out, in both arrays")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    _, ids = np.unique(names, return_inverse=True)
    return before, after, ids.astype(np.int64)


def _exact_p(moves: Array) -> float | None:
    """Share of all sign flips of ``moves`` (C,) whose sum is as far from zero as theirs; None if it cannot be counted.

    The distribution of the sum is built up cluster by cluster, on the multiples of a unit that all of them share.
    """
    moved = moves[np.abs(moves) > 1e-9]
    unit = next((u for u in _UNITS if np.allclose(moved / u, np.rint(moved / u), rtol=0, atol=1e-6)), None)
    if unit is None:
        return None
    steps = np.rint(moved / unit).astype(np.int64)
    reach = int(np.abs(steps).sum())
    if reach * steps.size > _MOST_STEPS:
        return None
    chances = np.ones(1)
    for step in np.abs(steps):
        grown = np.zeros(chances.size + 2 * step)
        grown[: chances.size] = chances / 2
        grown[2 * step :] += chances / 2
        chances = grown
    sums = np.arange(chances.size) - reach
    return min(1.0, float(chances[np.abs(sums) >= abs(int(steps.sum()))].sum()))


def _interval_notes(before: Array, after: Array, n_clusters: int) -> list[str]:
    if not np.any(before != after):
        return [
            "no score differs, so the interval has no width; with 95 % confidence fewer than "
            f"{min(1.0, 3 / n_clusters):.2g} of all clusters would differ (rule of three)"
        ]
    return [f"only {n_clusters} clusters: read the interval with care"] if n_clusters < FEW_CLUSTERS else []


def _mean_resamplers(
    before: Array, after: Array, ids: NDArray[np.int64], n_clusters: int, scale: float
) -> tuple[_Resampler, _Resampler]:
    """A mean needs only sums and sizes of clusters, so all resamples are a few array operations."""
    sums = [np.bincount(ids, weights=scores, minlength=n_clusters) for scores in (before, after)]
    sizes = np.bincount(ids, minlength=n_clusters).astype(np.float64)

    def resample(generator: np.random.Generator, count: int) -> tuple[Array, Array]:
        parts = []
        for rows in _chunks(count, n_clusters):
            draws = generator.integers(0, n_clusters, (rows, n_clusters), dtype=np.int32)
            totals = sizes.take(draws).sum(axis=1)
            parts.append([scale * values.take(draws).sum(axis=1) / totals for values in sums])
        return _joined(parts)

    def permute(generator: np.random.Generator, count: int) -> tuple[Array, Array]:
        parts = []
        for rows in _chunks(count, n_clusters):
            swap = generator.integers(0, 2, (rows, n_clusters), dtype=np.int8).astype(np.float64)
            moved = swap @ (sums[1] - sums[0])
            parts.append([scale * (sums[0].sum() + moved) / sizes.sum(), scale * (sums[1].sum() - moved) / sizes.sum()])
        return _joined(parts)

    return resample, permute


def _general_resamplers(
    pairs: tuple[Sample, Sample], n_clusters: int, aggregate: Aggregate
) -> tuple[_Resampler, _Resampler]:
    """Any aggregate: build every resample and call it."""
    ids = pairs[0].clusters
    by_cluster = np.argsort(ids, kind="stable")
    sizes = np.bincount(ids, minlength=n_clusters)
    starts = np.cumsum(sizes) - sizes

    def resample(generator: np.random.Generator, count: int) -> tuple[Array, Array]:
        values = np.empty((2, count))
        for i in range(count):
            draw = generator.integers(0, n_clusters, n_clusters)
            drawn = sizes[draw]
            new_ids = np.repeat(np.arange(n_clusters), drawn)
            offsets = np.arange(new_ids.size) - np.repeat(np.cumsum(drawn) - drawn, drawn)
            rows = by_cluster[np.repeat(starts[draw], drawn) + offsets]
            for j, pair in enumerate(pairs):
                taken = {name: column[rows] for name, column in pair.columns.items()}
                values[j, i] = aggregate(Sample(pair.scores[rows], new_ids, taken))
        return values[0], values[1]

    def permute(generator: np.random.Generator, count: int) -> tuple[Array, Array]:
        values = np.empty((2, count))
        first, second = pairs
        for i in range(count):
            swap = generator.integers(0, 2, n_clusters).astype(bool)[ids]
            for j, (one, other) in enumerate(((first, second), (second, first))):
                mixed = {name: np.where(swap, other.columns[name], one.columns[name]) for name in one.columns}
                values[j, i] = aggregate(Sample(np.where(swap, other.scores, one.scores), ids, mixed))
        return values[0], values[1]

    return resample, permute


def _chunks(count: int, n_clusters: int) -> list[int]:
    rows = max(1, _CHUNK // n_clusters)
    return [min(rows, count - start) for start in range(0, count, rows)]


def _joined(parts: list[list[Array]]) -> tuple[Array, Array]:
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _expanded_percentiles(values: Array, n: int, level: float) -> Interval:
    from scipy import stats

    quantile = stats.t.ppf((1 + level) / 2, n - 1)
    tail = float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * quantile))
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high), level)
