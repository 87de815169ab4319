"""Paired cluster bootstrap and paired permutation test of a pruned model against its baseline.

Use them through `ivcp_eval.reports.stats`, whose conventions hold here. Every metric is a function of sums over
samples (`Sums`): a mean of two sums, MME's total of four sums per category. Resamples therefore need only the sums of
each cluster (`Paired`). Where these take few values, as with scores of 0 and 1, it is drawn how often each value
occurs, at a cost that does not grow with the samples. Else clusters are drawn, once for all comparisons of equally many
of them, and one matrix product gives the resamples of all.

Memory beside the `Paired` themselves: their distinct sums once more, 8 * resamples bytes for each of these, and about
100 MB, whatever the number of samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ivcp_eval.reports.stats.signflips import sign_flip_p

__all__ = ["Array", "Interval", "Paired", "PairedResult", "Sums", "paired_bootstrap", "paired_bootstraps"]

Array = NDArray[np.float64]
FEW_CLUSTERS = 20
_CHUNK = 4_000_000  # numbers drawn at once
#: Up to so many kinds of clusters, and this many times fewer than clusters, drawing numbers of each kind is faster.
_MOST_KINDS, _FEWER = 256, 10


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


@dataclass(frozen=True)
class Paired:
    """Two sides of one comparison, as far as resampling needs them: sums of clusters, no single scores.

    Attributes:
        sums: (C, M) distinct columns of sums, one row per cluster.
        places: (2, K) which columns are the K sums of the baseline and of the pruned model.
        combine: sums (..., K) -> metric (...).
        is_mean: the metric is a mean of scores. differs: some sample differs between the sides.
        n_samples: how many there are.
    """

    sums: Array
    places: NDArray[np.int64]
    combine: Callable[[Array], Array]
    is_mean: bool
    differs: bool
    n_samples: int

    @classmethod
    def of(
        cls,
        baseline: ArrayLike,
        pruned: ArrayLike,
        clusters: Sequence[object] | NDArray | None = None,
        *,
        sums: Sums | None = None,
        scale: float = 1.0,
    ) -> Paired:
        """From the scores of samples; arguments and errors as for `paired_bootstrap`."""
        before, after, ids = _checked(baseline, pruned, clusters)
        metric = sums or _mean(before, after, scale)
        n_clusters = int(ids.max()) + 1
        place_of: dict[bytes, int] = {}
        columns: list[Array] = []
        places = []
        for terms in (*metric.baseline.T, *metric.pruned.T):
            column: Array = np.bincount(ids, weights=terms, minlength=n_clusters).astype(np.float64)
            place = place_of.setdefault(_digest(column), len(columns))
            columns += [column] if place == len(columns) else []
            places.append(place)
        return cls(
            np.stack(columns, axis=1),
            np.array(places).reshape(2, -1),
            metric.combine,
            sums is None,
            bool(np.any(metric.baseline != metric.pruned)),
            before.size,
        )

    @property
    def n_clusters(self) -> int:
        """Clusters, which are resampled."""
        return len(self.sums)

    @property
    def totals(self) -> Array:
        """(2, K) sums over everything."""
        return self.sums.sum(axis=0)[self.places]

    @property
    def moved(self) -> Array:
        """(C, K) what the baseline's sums gain when a cluster's sides change places."""
        return self.sums[:, self.places[1]] - self.sums[:, self.places[0]]

    @cached_property
    def kinds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """A cluster of each kind, and how many there are of it; of one kind are equal sums. None: too many kinds."""
        most = min(_MOST_KINDS, (self.n_clusters - 1) // _FEWER)
        codes = np.zeros(self.n_clusters, dtype=np.int64)
        # Rounded, so that the order of a cluster's samples does not make two kinds of one.
        for column in np.round(self.sums, 10).T:
            values, inverse = np.unique(column, return_inverse=True)
            if values.size > most:
                return None
            _, codes = np.unique(codes * values.size + inverse, return_inverse=True)
        _, first, counts = np.unique(codes, return_index=True, return_counts=True)
        return None if first.size > most else (first, counts)


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
    one = Paired.of(baseline, pruned, clusters, sums=sums, scale=scale)
    return paired_bootstraps([one], resamples=resamples, level=level, seed=seed)[0]


def paired_bootstraps(
    comparisons: Sequence[Paired], *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> list[PairedResult]:
    """`paired_bootstrap` of many comparisons, each with the result that it has alone.

    Comparisons of equally many clusters share their draws: what chance does to one it does to all.

    Raises:
        ValueError: a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    results: list[PairedResult | None] = [None] * len(comparisons)
    for n_clusters in {one.n_clusters for one in comparisons}:
        places = [i for i, one in enumerate(comparisons) if one.n_clusters == n_clusters]
        group = [comparisons[i] for i in places]
        if n_clusters == 1:
            compared = [_of_one_cluster(one, level) for one in group]
        else:
            drawn = _resampled(group, resamples, seed)
            counted = [sign_flip_p(one.moved[:, 0]) if one.is_mean else None for one in group]
            left = [one for one, p_value in zip(group, counted, strict=True) if p_value is None]
            swapped = iter(_permuted(left, resamples, seed))
            compared = [
                _result(one, sums, _share_as_extreme(one, next(swapped)) if p_value is None else p_value, level)
                for one, sums, p_value in zip(group, drawn, counted, strict=True)
            ]
        for i, result in zip(places, compared, strict=True):
            results[i] = result
    return [result for result in results if result is not None]


def _of_one_cluster(one: Paired, level: float) -> PairedResult:
    before, after = (float(value) for value in one.combine(one.totals))
    undefined = Interval(math.nan, math.nan, level)
    notes = ["the baseline score is zero: retained is undefined"] if before == 0 else []
    return PairedResult(
        *(before, after, after - before, undefined, after / before if before else math.nan, undefined),
        *(math.nan, math.nan, one.n_samples, 1, (*notes, "one cluster only: no interval and no test")),
    )


def _result(one: Paired, drawn: Array, p_value: float, level: float) -> PairedResult:
    """``drawn``: (2, resamples) metrics of the resamples."""
    before, after = (float(value) for value in one.combine(one.totals))
    notes = []
    retained, retained_interval = math.nan, Interval(math.nan, math.nan, level)
    zeros = int(np.count_nonzero(drawn[0] == 0))
    if before == 0:
        notes.append("the baseline score is zero: retained is undefined")
    else:
        retained = after / before
        if zeros:
            notes.append(
                f"the baseline score is zero in {zeros} of {drawn.shape[1]} resamples: no interval of retained"
            )
        else:
            retained_interval = _expanded_percentiles(drawn[1] / drawn[0], one.n_clusters, level)
    differences = drawn[1] - drawn[0]
    return PairedResult(
        before,
        after,
        after - before,
        _expanded_percentiles(differences, one.n_clusters, level),
        retained,
        retained_interval,
        float(differences.std(ddof=1)),
        p_value,
        one.n_samples,
        one.n_clusters,
        (*notes, *_interval_notes(one)),
    )


def _share_as_extreme(one: Paired, swapped: Array) -> float:
    """Two-sided p of the (2, permutations) metrics after sides changed places."""
    before, after = (float(value) for value in one.combine(one.totals))
    tolerance = 1e-9 * max(1.0, abs(before), abs(after))
    as_extreme = int(np.count_nonzero(np.abs(swapped[1] - swapped[0]) >= abs(after - before) - tolerance))
    return (1 + as_extreme) / (1 + swapped.shape[1])


def _checked(
    baseline: ArrayLike, pruned: ArrayLike, clusters: Sequence[object] | NDArray | None
) -> tuple[Array, Array, NDArray[np.int64]]:
    """The scores, and the number of each sample's cluster."""
    before, after = np.asarray(baseline, dtype=np.float64), np.asarray(pruned, dtype=np.float64)
    names = np.arange(before.size) if clusters is None else np.asarray(clusters)
    if before.ndim != 1 or before.shape != after.shape or names.shape != before.shape:
        shapes = f"{before.shape}, {after.shape} and {names.shape}"
        raise ValueError(f"baseline, pruned and clusters must be (n,) arrays of one length, got {shapes}")
    if before.size == 0:
        raise ValueError("no samples: a comparison needs at least one")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("scores must be finite; leave samples without a score out, in both arrays")
    _, ids = np.unique(names, return_inverse=True)
    return before, after, ids.astype(np.int64)


def _interval_notes(one: Paired) -> list[str]:
    if not one.differs:
        return [
            "no score differs, so the interval has no width; with 95 % confidence fewer than "
            f"{min(1.0, 3 / one.n_clusters):.2g} of all clusters would differ (rule of three)"
        ]
    few = f"only {one.n_clusters} clusters: read the interval with care"
    return [few] if one.n_clusters < FEW_CLUSTERS else []


def _mean(before: Array, after: Array, scale: float) -> Sums:
    ones = np.ones(before.size)
    return Sums(
        np.stack([before, ones], axis=1),
        np.stack([after, ones], axis=1),
        lambda totals: scale * totals[..., 0] / totals[..., 1],
    )


def _resampled(group: Sequence[Paired], count: int, seed: int) -> list[Array]:
    """Per comparison the (2, count) metrics of resamples of as many clusters as there are."""
    n_clusters = group[0].n_clusters

    def draw(generator: np.random.Generator, rows: int) -> Array:
        places = generator.integers(0, n_clusters, (rows, n_clusters), dtype=np.int32)
        places += n_clusters * np.arange(rows, dtype=np.int32)[:, None]
        return np.bincount(places.ravel(), minlength=rows * n_clusters).reshape(rows, -1).astype(np.float64)

    def draw_kinds(generator: np.random.Generator, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        return generator.multinomial(n_clusters, counts / n_clusters, count)

    totals = _totals(group, [one.sums for one in group], draw, draw_kinds, count, seed)
    return [one.combine(sums[:, one.places].transpose(1, 0, 2)) for one, sums in zip(group, totals, strict=True)]


def _permuted(group: Sequence[Paired], count: int, seed: int) -> list[Array]:
    """Per comparison the (2, count) metrics after the sides changed places in a random half of the clusters."""
    if not group:
        return []
    n_clusters = group[0].n_clusters

    def draw(generator: np.random.Generator, rows: int) -> Array:
        bits = np.frombuffer(generator.bytes(-(-rows * n_clusters // 8)), dtype=np.uint8)
        return np.unpackbits(bits, count=rows * n_clusters).reshape(rows, -1).astype(np.float64)

    def draw_kinds(generator: np.random.Generator, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        return generator.binomial(counts, 0.5, (count, counts.size))

    totals = _totals(group, [one.moved for one in group], draw, draw_kinds, count, seed)
    return [
        one.combine(one.totals[:, None] + np.stack([moved, -moved])) for one, moved in zip(group, totals, strict=True)
    ]


def _totals(
    group: Sequence[Paired],
    parts: Sequence[Array],
    draw: Callable[[np.random.Generator, int], Array],
    draw_kinds: Callable[[np.random.Generator, NDArray[np.int64]], NDArray[np.int64]],
    count: int,
    seed: int,
) -> Iterator[Array]:
    """Per comparison the (count, M) sums of its parts, each cluster's (C, M) as often as was drawn for it.

    Args:
        draw: (generator, rows) -> (rows, C) how often each cluster counts. draw_kinds: (generator, (kinds,) clusters of
            each kind) -> (count, kinds) how often each kind does.
    """
    n_clusters = group[0].n_clusters
    many = [part for one, part in zip(group, parts, strict=True) if one.kinds is None]
    shared = iter(_products(many, draw, n_clusters, count, seed))
    for one, part in zip(group, parts, strict=True):
        if one.kinds is None:
            yield next(shared)
        else:
            first, counts = one.kinds
            yield draw_kinds(np.random.default_rng([seed, n_clusters]), counts).astype(np.float64) @ part[first]


def _products(
    parts: Sequence[Array],
    draw: Callable[[np.random.Generator, int], Array],
    n_clusters: int,
    count: int,
    seed: int,
) -> list[Array]:
    """Per part (C, M) the (count, M) products of one random (count, C) matrix with it, drawn some rows at a time."""
    if not parts:
        return []
    place_of: dict[bytes, int] = {}
    columns: list[Array] = []
    places = []
    for part in parts:
        own = []
        for column in part.T:
            place = place_of.setdefault(_digest(column), len(columns))
            columns += [column] if place == len(columns) else []
            own.append(place)
        places.append(own)
    together = np.stack(columns, axis=1)
    products = np.empty((count, len(columns)))
    generator = np.random.default_rng([seed, n_clusters])
    rows = max(1, _CHUNK // n_clusters)
    for start in range(0, count, rows):
        stop = min(count, start + rows)
        products[start:stop] = draw(generator, stop - start) @ together
    return [products[:, own] for own in places]


def _digest(column: Array) -> bytes:
    """Equal for equal columns, which are multiplied once."""
    return hashlib.blake2b(np.ascontiguousarray(column).tobytes(), digest_size=16).digest()


def _expanded_percentiles(values: Array, n: int, level: float) -> Interval:
    # scipy.special, since importing scipy.stats takes longer than most comparisons.
    from scipy import special

    quantile = special.stdtrit(n - 1, (1 + level) / 2)
    tail = float(special.ndtr(-math.sqrt(n / (n - 1)) * quantile))
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high), level)
