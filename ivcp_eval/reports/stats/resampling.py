"""Paired cluster bootstrap and paired permutation test of a pruned model against its baseline.

Use them through `ivcp_eval.reports.stats`, whose conventions hold here. Every metric is a function of sums over
samples (`Sums`): a mean of two sums, MME's total of four sums per category. Resamples therefore need only the sums of
each cluster, and clusters with equal sums are drawn together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Array", "Interval", "PairedResult", "Sums", "paired_bootstrap"]

Array = NDArray[np.float64]
FEW_CLUSTERS = 20
_CHUNK = 4_000_000  # numbers drawn at once
#: What scores and their means over a few seeds are multiples of; then every permutation can be counted.
_UNITS = tuple(1 / parts for parts in (1, 2, 3, 6, 10, 30, 100, 300))
_MOST_STEPS = 2_000_000_000


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
class Sums:
    """A metric as a function of sums over samples, so that a resample is scored from the sums of its clusters.

    Attributes:
        baseline, pruned: (n, K) terms of each sample. A term may concern a group of samples (e.g. all rotations of a
            question); it then stands at one of them, and the group lies inside one cluster.
        combine: sums (..., K) of the terms -> metric (...).
    """

    baseline: Array
    pruned: Array
    combine: Callable[[Array], Array]


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
    sums: Sums | None = None,
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
        sums: the metric, where it is not the mean of the scores times ``scale``.
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
    metric = sums or _mean(before, after, scale)
    totals = np.stack([metric.baseline.sum(axis=0), metric.pruned.sum(axis=0)])
    of_baseline, of_pruned = (float(value) for value in metric.combine(totals))
    difference = of_pruned - of_baseline
    undefined = Interval(math.nan, math.nan, level)
    notes = []
    if of_baseline == 0:
        notes.append("the baseline score is zero: retained is undefined")
    retained = of_pruned / of_baseline if of_baseline != 0 else math.nan
    sizes = before.size, n_clusters
    if n_clusters == 1:
        notes.append("one cluster only: no interval and no test")
        return PairedResult(
            *(of_baseline, of_pruned, difference), undefined, retained, undefined, math.nan, math.nan, *sizes, (*notes,)
        )
    generator = np.random.default_rng(seed)
    kinds = _Kinds.of(metric, ids, n_clusters)
    drawn = metric.combine(kinds.resampled(generator, resamples))
    differences = drawn[1] - drawn[0]
    difference_interval = _expanded_percentiles(differences, n_clusters, level)
    retained_interval = undefined
    zeros = int(np.count_nonzero(drawn[0] == 0))
    if of_baseline != 0 and zeros:
        notes.append(f"the baseline score is zero in {zeros} of {resamples} resamples: no interval of retained")
    elif of_baseline != 0:
        retained_interval = _expanded_percentiles(drawn[1] / drawn[0], n_clusters, level)
    notes += _interval_notes(metric, n_clusters)
    moves = np.bincount(ids, weights=after - before, minlength=n_clusters).astype(np.float64)
    p_value = _exact_p(moves) if sums is None else None
    if p_value is None:
        swapped = metric.combine(kinds.permuted(generator, resamples))
        tolerance = 1e-9 * max(1.0, abs(of_baseline), abs(of_pruned))
        as_extreme = int(np.count_nonzero(np.abs(swapped[1] - swapped[0]) >= abs(difference) - tolerance))
        p_value = (1 + as_extreme) / (1 + resamples)
    return PairedResult(
        of_baseline,
        of_pruned,
        difference,
        difference_interval,
        retained,
        retained_interval,
        float(differences.std(ddof=1)),
        p_value,
        *sizes,
        tuple(notes),
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


def _interval_notes(metric: Sums, n_clusters: int) -> list[str]:
    if not np.any(metric.baseline != metric.pruned):
        return [
            "no score differs, so the interval has no width; with 95 % confidence fewer than "
            f"{min(1.0, 3 / n_clusters):.2g} of all clusters would differ (rule of three)"
        ]
    return [f"only {n_clusters} clusters: read the interval with care"] if n_clusters < FEW_CLUSTERS else []


def _mean(before: Array, after: Array, scale: float) -> Sums:
    ones = np.ones(before.size)
    return Sums(
        np.stack([before, ones], axis=1),
        np.stack([after, ones], axis=1),
        lambda totals: scale * totals[..., 0] / totals[..., 1],
    )


@dataclass(frozen=True)
class _Kinds:
    """Clusters whose sums are equal are of one kind, and only how many of each kind are drawn matters.

    Attributes:
        sums: (kinds, 2, K) sums of one cluster, of the baseline and of the pruned model.
        counts: (kinds,) clusters of each kind.
    """

    sums: Array
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, metric: Sums, ids: NDArray[np.int64], n_clusters: int) -> _Kinds:
        """``ids``: (n,) cluster 0..C-1 of each sample."""
        terms = np.concatenate([metric.baseline, metric.pruned], axis=1)
        sums = np.zeros((n_clusters, terms.shape[1]))
        np.add.at(sums, ids, terms)
        # Rounded, so that the order of a cluster's samples does not make two kinds of one.
        kinds, counts = np.unique(np.round(sums, 10), axis=0, return_counts=True)
        return cls(kinds.reshape(len(kinds), 2, -1), counts)

    def resampled(self, generator: np.random.Generator, count: int) -> Array:
        """(2, count, K) sums of resamples with as many clusters as there are."""
        n_clusters = int(self.counts.sum())
        parts = []
        for rows in self._chunks(count):
            if self._few:
                drawn = generator.multinomial(n_clusters, self.counts / n_clusters, rows)
            else:
                kind = np.repeat(np.arange(self.counts.size), self.counts)
                places = kind[generator.integers(0, n_clusters, (rows, n_clusters), dtype=np.int32)]
                places += self.counts.size * np.arange(rows)[:, None]
                drawn = np.bincount(places.ravel(), minlength=rows * self.counts.size).reshape(rows, -1)
            parts.append(np.tensordot(drawn.astype(np.float64), self.sums, 1))
        return np.concatenate(parts).transpose(1, 0, 2)

    def permuted(self, generator: np.random.Generator, count: int) -> Array:
        """(2, count, K) sums after the two sides changed places in a random half of the clusters."""
        parts = []
        for rows in self._chunks(count):
            if self._few:
                swapped = generator.binomial(self.counts, 0.5, (rows, self.counts.size))
            else:
                bits = generator.integers(0, 2, (rows, int(self.counts.sum())), dtype=np.int8)
                swapped = np.add.reduceat(bits, np.cumsum(self.counts) - self.counts, axis=1, dtype=np.int64)
            moved = np.tensordot(swapped.astype(np.float64), self.sums[:, ::-1] - self.sums, 1)
            parts.append(np.tensordot(self.counts, self.sums, 1) + moved)
        return np.concatenate(parts).transpose(1, 0, 2)

    @property
    def _few(self) -> bool:
        """Whether numbers of each kind are drawn faster than single clusters: one of these takes about a tenth."""
        return 10 * self.counts.size < int(self.counts.sum())

    def _chunks(self, count: int) -> list[int]:
        rows = max(1, _CHUNK // int(self.counts.sum()))
        return [min(rows, count - start) for start in range(0, count, rows)]


def _expanded_percentiles(values: Array, n: int, level: float) -> Interval:
    # scipy.special, since importing scipy.stats takes longer than most comparisons.
    from scipy import special

    quantile = special.stdtrit(n - 1, (1 + level) / 2)
    tail = float(special.ndtr(-math.sqrt(n / (n - 1)) * quantile))
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high), level)
