"""One metric of a pruned variant against its baseline, from the per-sample rows of both.

A side is one variant; where its method draws, it has one mapping of samples for each seed, and its metric is the mean
over the seeds of the metric of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivcp_eval.reports.stats import Array, Flips, PairedResult, Sums, flips, mcnemar, paired_bootstrap
from ivcp_eval.reports.stats.aggregates import COLUMNS, Rule, rule_for

__all__ = ["PairedMetric", "Samples", "paired_metric"]

Samples = Mapping[str, Mapping[str, Any]]
"""Index of a sample -> its row of the per-sample CSV."""

# Evaluators round: half a unit of the first decimal of a percentage, and a little.
_REPRODUCED = 5.1e-4


@dataclass(frozen=True)
class PairedMetric:
    """What the samples say about one metric.

    Attributes:
        result: difference, interval, sizes.
        flips: of single answers. ``answers_changed`` is meaningless where a side has several seeds.
        test, p_value: "McNemar" for independent 0/1 verdicts, else "permutation".
        unscored: samples without a score of their own, which are left out.
    """

    result: PairedResult
    flips: Flips
    test: str
    p_value: float
    unscored: int


def paired_metric(
    benchmark: str,
    metric: str,
    scale: float,
    baseline: Sequence[Samples],
    pruned: Sequence[Samples],
    reported: tuple[Sequence[float], Sequence[float]],
    *,
    resamples: int,
    seed: int,
) -> PairedMetric | str:
    """Paired statistics of one metric, or why the per-sample scores do not give it.

    Args:
        benchmark, metric, scale: as in the results CSV.
        baseline, pruned: one mapping for each seed, all with the same indices.
        reported: scores of the baseline's and of the pruned seeds, which the samples must reproduce.
        resamples, seed: of the bootstrap.
    """
    rule = rule_for(benchmark, metric, scale)
    indices = _of_category(baseline[0], metric)
    sides = [[_columns(samples, indices) for samples in side] for side in (baseline, pruned)]
    scores = [np.stack([rule.scores(columns) for columns in side]) for side in sides]
    scored = ~np.isnan(scores[0].sum(axis=0) + scores[1].sum(axis=0))
    if not scored.any():
        return "no sample has a score of its own"
    scores = [of_side[:, scored] for of_side in scores]
    sides = [[{name: c[scored] for name, c in columns.items()} for columns in side] for side in sides]
    first = sides[0][0]
    given = np.array([baseline[0][i]["cluster"] or f"index {i}" for i in first["index"]])
    clusters = rule.clusters(first, given)
    summands = [
        [rule.summands(columns, own, clusters) for columns, own in zip(side, of_side, strict=True)]
        for side, of_side in zip(sides, scores, strict=True)
    ]
    for terms, stated in zip((*summands[0], *summands[1]), (*reported[0], *reported[1]), strict=True):
        got = float(rule.combine(terms.sum(axis=0)))
        if abs(got - stated) > _REPRODUCED * scale:
            return f"the per-sample scores give {got:.6g}, not the reported {stated:.6g}"
    before, after = (of_side.mean(axis=0) for of_side in scores)
    result = paired_bootstrap(
        before,
        after,
        clusters,
        sums=None if rule.terms is None else _over_seeds(rule, *summands),
        scale=scale,
        resamples=resamples,
        seed=seed,
    )
    changed = flips(before, after, *(side[0]["prediction"].tolist() for side in sides))
    # McNemar's test needs independent samples and an average of their verdicts.
    exact = result.n_clusters == result.n_samples and rule.terms is None and not changed.graded
    return PairedMetric(
        result,
        changed,
        "McNemar" if exact else "permutation",
        mcnemar(before, after).p_value if exact else result.p_value,
        len(indices) - int(scored.sum()),
    )


def _of_category(samples: Samples, metric: str) -> list[str]:
    """Indices of the samples that a metric is about: those of the category it is named after, else all."""
    named = [index for index, row in samples.items() if row["category"].lower() == metric.lower()]
    return named or list(samples)


def _columns(samples: Samples, indices: Sequence[str]) -> dict[str, NDArray]:
    return {name: np.array([samples[i][name] for i in indices], dtype=object) for name in COLUMNS}


def _over_seeds(rule: Rule, baseline: Sequence[Array], pruned: Sequence[Array]) -> Sums:
    """Terms (n, seeds * K) of both sides; a side with fewer seeds repeats its own, which leaves its mean as it is."""
    seeds = math.lcm(len(baseline), len(pruned))
    wide = [np.concatenate([*side] * (seeds // len(side)), axis=1) for side in (baseline, pruned)]
    return Sums(wide[0], wide[1], partial(_mean_over_seeds, rule.combine, seeds))


def _mean_over_seeds(combine: Callable[[Array], Array], seeds: int, totals: Array) -> Array:
    return combine(totals.reshape(*totals.shape[:-1], seeds, -1)).mean(axis=-1)
