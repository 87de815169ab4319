"""One metric of a pruned variant against its baseline, from the per-sample files of both.

A side is one variant; where its method draws, it has the samples of each seed, and its metric is the mean
over the seeds of the metric of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivcp_eval.reports.stats import Array, Flips, Paired, Sums, flips, mcnemar
from ivcp_eval.reports.stats.aggregates import COLUMNS, Rule, rule_for
from ivcp_eval.reports.table import read_sample_columns

__all__ = ["PairedMetric", "Samples", "paired_metric"]

# Evaluators round: half a unit of the first decimal of a percentage, and a little.
_REPRODUCED = 5.1e-4


@dataclass(frozen=True)
class Samples:
    """The per-sample rows of one run, as far as a comparison reads them: column -> (n,) values."""

    columns: Mapping[str, NDArray]

    @classmethod
    def read(cls, path: Path, known: dict[str, dict[str, Any]] | None = None) -> Samples:
        """From a per-sample CSV; ``known``, and what it raises, as of `read_sample_columns`."""
        columns = read_sample_columns(path, [*COLUMNS, "cluster", "prompt_sha256"], known)
        return cls({name: np.array(values, dtype=object) for name, values in columns.items()})

    def __len__(self) -> int:
        return len(self.columns["index"])

    @cached_property
    def rows(self) -> dict[str, int]:
        """Index of a sample -> its row."""
        return {index: row for row, index in enumerate(self.columns["index"])}

    @cached_property
    def clusters(self) -> NDArray[np.int64]:
        """(n,) number of the cluster of each sample; one that names none is its own."""
        names = zip(self.columns["cluster"], self.columns["index"], strict=True)
        return np.unique([cluster or f"index {index}" for cluster, index in names], return_inverse=True)[1]

    def shared(self, other: Samples) -> tuple[Samples, Samples]:
        """The samples that both have, of both, in the order of this one."""
        own = self.columns["index"]
        if self is other or np.array_equal(own, other.columns["index"]):
            return self, other
        shared = [index for index in own if index in other.rows]
        return self._taken([self.rows[index] for index in shared]), other._taken([other.rows[i] for i in shared])

    def _taken(self, rows: list[int]) -> Samples:
        return Samples({name: column[rows] for name, column in self.columns.items()})


@dataclass(frozen=True)
class PairedMetric:
    """What the samples say about one metric, before any resampling.

    Attributes:
        paired: what is to be resampled.
        flips: of single answers; where a side has several seeds their mean, and ``answers_changed`` is of the first.
        mcnemar: p-value for independent 0/1 verdicts; None elsewhere, where sides are permuted.
        unscored: samples without a score of their own, which are left out.
    """

    paired: Paired
    flips: Flips
    mcnemar: float | None
    unscored: int


def paired_metric(
    benchmark: str,
    metric: str,
    scale: float,
    baseline: Sequence[Samples],
    pruned: Sequence[Samples],
    reported: tuple[Sequence[float], Sequence[float]],
) -> PairedMetric | str:
    """Paired statistics of one metric, or why the per-sample scores do not give it.

    Args:
        benchmark, metric, scale: as in the results CSV.
        baseline, pruned: the samples of each seed, all with the same indices in the same order.
        reported: scores of the baseline's and of the pruned seeds, which the samples must reproduce.
    """
    rule = rule_for(benchmark, metric, scale)
    about = _of_category(baseline[0], metric)
    sides = [[_columns(samples, about) for samples in side] for side in (baseline, pruned)]
    scores = [np.stack([rule.scores(columns) for columns in side]) for side in sides]
    scored = ~np.isnan(scores[0].sum(axis=0) + scores[1].sum(axis=0))
    if not scored.any():
        return "no sample has a score of its own"
    scores = [of_side[:, scored] for of_side in scores]
    sides = [[{name: c[scored] for name, c in columns.items()} for columns in side] for side in sides]
    first = sides[0][0]
    clusters = rule.clusters(first, baseline[0].clusters[about][scored])
    summands = [
        [rule.summands(columns, own, clusters) for columns, own in zip(side, of_side, strict=True)]
        for side, of_side in zip(sides, scores, strict=True)
    ]
    for terms, stated in zip((*summands[0], *summands[1]), (*reported[0], *reported[1]), strict=True):
        got = float(rule.combine(terms.sum(axis=0)))
        if abs(got - stated) > _REPRODUCED * scale:
            return f"the per-sample scores give {got:.6g}, not the reported {stated:.6g}"
    before, after = (of_side.mean(axis=0) for of_side in scores)
    paired = Paired.of(
        before, after, clusters, sums=None if rule.terms is None else _over_seeds(rule, *summands), scale=scale
    )
    changed = _mean_flips(scores[0], scores[1], *(side[0]["prediction"].tolist() for side in sides))
    # McNemar's test needs independent samples and an average of their verdicts.
    one_seed = len(scores[0]) == len(scores[1]) == 1
    exact = one_seed and paired.n_clusters == paired.n_samples and rule.terms is None and not changed.graded
    unscored = int(scored.size - scored.sum())
    return PairedMetric(paired, changed, mcnemar(before, after).p_value if exact else None, unscored)


def _mean_flips(before: Array, after: Array, *answers: Sequence[str]) -> Flips:
    """Of scores (seeds, n): a mean over seeds has few whole answers that could flip, so each seed is counted."""
    seeds = math.lcm(len(before), len(after))
    each = [flips(before[seed % len(before)], after[seed % len(after)], *answers) for seed in range(seeds)]
    lost, gained = (fmean(getattr(one, name) for one in each) for name in ("right_to_wrong", "wrong_to_right"))
    return replace(each[0], right_to_wrong=lost, wrong_to_right=gained, graded=any(one.graded for one in each))


def _of_category(samples: Samples, metric: str) -> NDArray[np.bool_]:
    """(n,) the samples that a metric is about: those of the category it is named after, else all."""
    named = np.array([category.lower() == metric.lower() for category in samples.columns["category"]], dtype=bool)
    return named if named.any() else np.ones(len(samples), dtype=bool)


def _columns(samples: Samples, rows: NDArray[np.bool_]) -> dict[str, NDArray]:
    return {name: samples.columns[name][rows] for name in COLUMNS}


def _over_seeds(rule: Rule, baseline: Sequence[Array], pruned: Sequence[Array]) -> Sums:
    """Terms (n, seeds * K) of both sides; a side with fewer seeds repeats its own, which leaves its mean as it is."""
    seeds = math.lcm(len(baseline), len(pruned))
    wide = [np.concatenate([*side] * (seeds // len(side)), axis=1) for side in (baseline, pruned)]
    return Sums(wide[0], wide[1], partial(_mean_over_seeds, rule.combine, seeds))


def _mean_over_seeds(combine: Callable[[Array], Array], seeds: int, totals: Array) -> Array:
    return combine(totals.reshape(*totals.shape[:-1], seeds, -1)).mean(axis=-1)
