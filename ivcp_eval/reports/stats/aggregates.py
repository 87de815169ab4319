"""Benchmark scores as functions of sums over samples, so that a resample can be scored as the benchmark scores it.

Transcribed from VLMEvalKit (ms-vlmeval 0.0.20, ``vlmeval/dataset/utils/yorn.py`` and ``multiple_choice.py``). Callers
must check that a rule reproduces the reported score on the full sample; where it does not (a judge decided otherwise,
a metric that single scores do not determine), no interval may be taken from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ivcp_eval.benchmarks.grounding import TOLERANCE
from ivcp_eval.reports.stats import Array

__all__ = ["COLUMNS", "Rule", "rule_for"]

COLUMNS = ("index", "category", "prediction", "answer", "score", "iou", "similarity")

# MME's two halves (yorn.py, MME_rating); each category counts 200 at most, hence 2000 + 800 = 2800.
_MME_PERCEPTION = (
    *("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene"),
)
_MME_REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
_CIRCULAR = re.compile(r"mmbench|ccbench|circular|mmcr", re.IGNORECASE)
_ROTATION = 1_000_000  # rotation r of question q has index q + r * 10^6


Columns = Mapping[str, NDArray]
_Terms = Callable[[Columns, Array, NDArray], Array]


def _own_scores(columns: Columns) -> Array:
    return columns["score"].astype(float)


def _shares(scale: float, totals: Array) -> Array:
    """Of pairs of sums (..., 2): the first over the second, times ``scale``; NaN where that is 0 / 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return scale * totals[..., 0] / totals[..., 1]


@dataclass(frozen=True)
class Rule:
    """How a metric follows from per-sample scores.

    Attributes:
        terms: columns, scores (n,) and clusters (n,) -> the terms (n, K) that are summed; None for the mean of the
            scores times the scale.
        combine: sums (..., K) of them -> metric (...).
        groups: numbers or names (n,) of samples that are scored together, from the columns; they must lie inside one
            cluster.
        scores: what each sample (n,) scores under this metric, from the columns; NaN if unknown.
    """

    combine: Callable[[Array], Array]
    terms: _Terms | None = None
    groups: Callable[[Columns], NDArray] | None = None
    scores: Callable[[Columns], Array] = _own_scores

    def clusters(self, columns: Columns, given: NDArray) -> NDArray:
        """The clusters (n,) to resample: the given ones, or the groups where one would be torn apart by them."""
        if self.groups is None:
            return given
        groups = self.groups(columns)
        pairs = {(str(group), str(cluster)) for group, cluster in zip(groups, given, strict=True)}
        return given if len(pairs) == np.unique(groups).size else groups

    def summands(self, columns: Columns, scores: Array, clusters: NDArray) -> Array:
        """The terms (n, K), those of a mean included; ``clusters`` are those that `clusters` gives."""
        if self.terms is not None:
            return self.terms(columns, scores, clusters)
        return np.stack([scores, np.ones(scores.size)], axis=1)

    def value(self, columns: Columns, scores: Array, clusters: NDArray) -> float:
        """The metric of the whole sample."""
        return float(self.combine(self.summands(columns, scores, clusters).sum(axis=0)))


def rule_for(benchmark: str, metric: str, scale: float) -> Rule:
    """The rule of a benchmark's metric; it may use the per-sample columns that `COLUMNS` names.

    Args:
        benchmark, metric: VLMEvalKit's names.
        scale: the metric's largest value (100, 2800, ...), by which shares are multiplied.
    """
    name = re.sub(r"[^a-z0-9+]", "", metric.lower())
    mean = partial(_shares, scale)
    if name in ("meaniou", "agreementmeaniou"):
        return Rule(mean, scores=lambda columns: columns["iou"].astype(float))
    if metric == "agreement_text_similarity":
        return Rule(mean, scores=lambda columns: columns["similarity"].astype(float))
    if metric == "agreement_exact":
        return Rule(mean, scores=lambda columns: _reached(columns["similarity"], 1))
    if (threshold := re.fullmatch(r"Acc@(0\.\d+)", metric)) and metric != "Acc@0.5":  # that one is `score`
        return Rule(mean, scores=lambda columns: _reached(columns["iou"], float(threshold[1])))
    if benchmark == "MME":
        kinds = {"perception": _MME_PERCEPTION, "reasoning": _MME_REASONING}
        kinds |= dict.fromkeys(("total", "overall", "sum"), (*_MME_PERCEPTION, *_MME_REASONING))
        return Rule(_mme, partial(_mme_terms, kinds[name])) if name in kinds else Rule(mean)
    if benchmark == "POPE":
        kind = {"overall": "f1", "f1": "f1", "precision": "precision", "recall": "recall"}.get(name, "accuracy")
        return Rule(lambda totals: np.nan_to_num(mean(totals)), partial(_pope_terms, kind))
    if benchmark.startswith("HallusionBench") and name in ("facc", "qacc"):
        place = 4 if name == "facc" else 5
        return Rule(
            mean,
            lambda columns, scores, clusters: _all_right(_hallusion_names(columns, place), scores),
            # Questions are grouped across the figures of one set (place 3).
            lambda columns: _hallusion_names(columns, 3),
        )
    if benchmark == "CV-Bench-2D":
        return Rule(partial(_mean_of_means, scale), _category_terms)
    if benchmark == "ChartQA_TEST" and name in ("human", "augmented"):
        return Rule(mean, lambda columns, scores, clusters: _of_category(columns, scores, f"test_{name}"))
    if _CIRCULAR.search(benchmark):
        return Rule(mean, lambda columns, scores, clusters: _all_right(_questions(columns), scores), groups=_questions)
    return Rule(mean)


def _reached(values: NDArray, threshold: float) -> Array:
    """1 where a value is ``threshold`` or more, else 0; NaN where there is none."""
    values = values.astype(float)
    return np.where(np.isnan(values), np.nan, values >= threshold - TOLERANCE)


def _all_right(groups: NDArray, scores: Array) -> Array:
    """(n, 2), at the first sample of each group: the lowest score in it, and 1; elsewhere 0."""
    _, first, ids = np.unique(groups, return_index=True, return_inverse=True)
    lowest = np.full(first.size, np.inf)
    np.minimum.at(lowest, ids, scores)
    terms = np.zeros((scores.size, 2))
    terms[first, 0], terms[first, 1] = lowest, 1
    return terms


def _category_terms(columns: Columns, scores: Array, clusters: NDArray) -> Array:
    """(n, 2 * categories): the score and 1 at the sample's category."""
    names = columns["category"].astype(str)
    member = (names[:, None] == np.unique(names)).astype(float)
    return np.stack([member * scores[:, None], member], axis=2).reshape(scores.size, -1)


def _mean_of_means(scale: float, totals: Array) -> Array:
    """CV-Bench-2D's mean over its sources (here categories) of the mean in each; a category not drawn is left out."""
    by_category = totals.reshape(*totals.shape[:-1], -1, 2)
    return scale * np.nanmean(_shares(1, by_category), axis=-1)


def _of_category(columns: Columns, scores: Array, category: str) -> Array:
    member = (columns["category"] == category).astype(float)
    return np.stack([member * scores, member], axis=1)


def _mme_terms(categories: tuple[str, ...], columns: Columns, scores: Array, clusters: NDArray) -> Array:
    """(n, 4 * categories): score and 1, and by image whether both of its questions are right and 1."""
    parts = []
    for category in categories:
        rows = columns["category"] == category
        part = np.zeros((scores.size, 4))
        if rows.any():
            part[rows, 0], part[rows, 1] = scores[rows], 1
            part[rows, 2:] = _all_right(clusters[rows], scores[rows])
        parts.append(part)
    return np.concatenate(parts, axis=1)


def _mme(totals: Array) -> Array:
    """Sum over categories of accuracy + accuracy+ in percent (accuracy+: both questions on an image are right)."""
    pairs = totals.reshape(*totals.shape[:-1], -1, 2)
    return np.nansum(_shares(100, pairs), axis=-1)


def _pope_terms(kind: str, columns: Columns, scores: Array, clusters: NDArray) -> Array:
    """(n, 2): numerator and denominator of F1, precision or recall of "yes", or of the accuracy."""
    # A question counts once in each category that it lists: VLMEvalKit explodes "adversarial,popular".
    weights = np.array([str(category).count(",") + 1.0 for category in columns["category"]])
    if kind == "accuracy":
        return np.stack([weights * scores, weights], axis=1)
    yes = np.array([str(answer).lower() == "yes" for answer in columns["answer"]])
    # A wrong answer to a "no" question is a "yes" only if it says so; an unreadable one counts as neither.
    said_yes = np.array([bool(re.search(r"\byes\b", str(t), re.IGNORECASE)) for t in columns["prediction"]])
    right = scores == 1
    hits, misses, alarms = weights * (yes & right), weights * (yes & ~right), weights * (~yes & ~right & said_yes)
    if kind == "f1":
        return np.stack([2 * hits, 2 * hits + alarms + misses], axis=1)
    return np.stack([hits, hits + (alarms if kind == "precision" else misses)], axis=1)


def _hallusion_names(columns: Columns, place: int) -> NDArray:
    """VLMEvalKit's index holds l2-category, set, figure and question at places 2..5 between underscores."""
    cells = [str(index).split("_") for index in columns["index"]]
    return np.array(["_".join([*cell[2:4], *cell[place : place + 1]]) for cell in cells])


def _questions(columns: Columns) -> NDArray:
    """The question of each rotation; what has no numeric index is its own question."""
    return np.array([str(int(i) % _ROTATION) if str(i).isdigit() else str(i) for i in columns["index"]])
