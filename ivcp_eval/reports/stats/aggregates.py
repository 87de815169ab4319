"""Benchmark scores recomputed from per-sample scores, so that a resample can be scored as the benchmark scores it.

Transcribed from VLMEvalKit (ms-vlmeval 0.0.20, ``vlmeval/dataset/utils/yorn.py`` and ``multiple_choice.py``). Whoever
uses one first checks that it reproduces the reported score on the full sample; where it does not (a judge decided
otherwise, a metric that single scores do not determine), no interval may be taken from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ivcp_eval.benchmarks.grounding import TOLERANCE
from ivcp_eval.reports.stats import Aggregate, Sample

__all__ = ["COLUMNS", "Rule", "rule_for"]

COLUMNS = ("index", "category", "prediction", "answer", "score", "iou")

# MME's two halves (yorn.py, MME_rating); each category counts 200 at most, hence 2000 + 800 = 2800.
_MME_PERCEPTION = (
    *("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene"),
)
_MME_REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
_CIRCULAR = re.compile(r"mmbench|ccbench|circular|mmcr", re.IGNORECASE)
_ROTATION = 1_000_000  # rotation r of question q has index q + r * 10^6


Columns = dict[str, NDArray]
_Prepare = Callable[[Mapping[str, NDArray]], Columns]


@dataclass(frozen=True)
class Rule:
    """How a metric follows from per-sample scores.

    Attributes:
        aggregate: None for 'the mean of the scores times the scale'.
        prepare: makes the arrays (n,) that `aggregate` needs from the columns, once, not per resample.
        groups: numbers or names (n,) of samples that are scored together, from the columns; they must lie inside one
            cluster.
        scores: what each sample (n,) scores under this metric, from the columns; NaN if unknown.
    """

    aggregate: Aggregate | None = None
    prepare: _Prepare = field(default=lambda columns: {})
    groups: Callable[[Mapping[str, NDArray]], NDArray] | None = None
    scores: Callable[[Mapping[str, NDArray]], NDArray] = lambda columns: columns["score"].astype(float)

    def clusters(self, columns: Mapping[str, NDArray], given: NDArray) -> NDArray:
        """The clusters (n,) to resample: the given ones, or the groups where one would be torn apart by them."""
        if self.groups is None:
            return given
        groups = self.groups(columns)
        pairs = {(str(group), str(cluster)) for group, cluster in zip(groups, given, strict=True)}
        return given if len(pairs) == np.unique(groups).size else groups


def rule_for(benchmark: str, metric: str, scale: float) -> Rule:
    """The rule of a benchmark's metric; it may use the per-sample columns that `COLUMNS` names.

    Args:
        benchmark, metric: VLMEvalKit's names.
        scale: the metric's largest value (100, 2800, ...), by which shares are multiplied.
    """
    name = re.sub(r"[^a-z0-9+]", "", metric.lower())
    if name == "meaniou":
        return Rule(scores=lambda columns: columns["iou"].astype(float))
    if (threshold := re.fullmatch(r"Acc@(0\.\d+)", metric)) and metric != "Acc@0.5":  # that one is `score`
        return Rule(scores=lambda columns: _hits(columns, float(threshold[1])))
    if benchmark == "MME":
        kinds = {"perception": _MME_PERCEPTION, "reasoning": _MME_REASONING}
        kinds |= dict.fromkeys(("total", "overall", "sum"), (*_MME_PERCEPTION, *_MME_REASONING))
        return Rule(_mme, lambda columns: _mme_columns(columns, kinds[name])) if name in kinds else Rule()
    if benchmark == "POPE":
        kind = {"overall": "f1", "f1": "f1", "precision": "precision", "recall": "recall"}.get(name, "accuracy")
        return Rule(lambda sample: scale * _pope(sample, kind), _pope_columns)
    if benchmark.startswith("HallusionBench") and name in ("facc", "qacc"):
        place = 4 if name == "facc" else 5
        return Rule(
            lambda sample: scale * _all_right(sample),
            lambda columns: {"group": _numbered(_hallusion_names(columns, place))},
            # Questions are grouped across the figures of one set (place 3).
            lambda columns: _hallusion_names(columns, 3),
        )
    if benchmark == "CV-Bench-2D":
        return Rule(lambda sample: scale * _mean_of_means(sample), _category_numbers)
    if benchmark == "ChartQA_TEST" and name in ("human", "augmented"):
        return Rule(
            lambda sample: scale * _mean_of(sample, "wanted"),
            lambda columns: {"wanted": columns["category"] == f"test_{name}"},
        )
    if _CIRCULAR.search(benchmark):
        return Rule(
            lambda sample: scale * _all_right(sample), lambda columns: {"group": _questions(columns)}, _questions
        )
    return Rule()


def _hits(columns: Mapping[str, NDArray], threshold: float) -> NDArray[np.float64]:
    overlaps = columns["iou"].astype(float)
    return np.where(np.isnan(overlaps), np.nan, overlaps >= threshold - TOLERANCE)


def _numbered(names: NDArray) -> NDArray[np.int64]:
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _all_right(sample: Sample) -> float:
    """Share of groups whose every sample is right; two draws of one cluster are two groups."""
    groups = sample.columns["group"]
    _, ids = np.unique(sample.clusters * (int(groups.max()) + 1) + groups, return_inverse=True)
    worst = np.full(int(ids.max()) + 1, np.inf)
    np.minimum.at(worst, ids, sample.scores)
    return float(worst.mean())


def _category_numbers(columns: Mapping[str, NDArray]) -> Columns:
    return {"category": _numbered(columns["category"].astype(str))}


def _mean_of_means(sample: Sample) -> float:
    """CV-Bench-2D's mean over its sources (here categories) of the mean in each."""
    categories = sample.columns["category"]
    sizes = np.bincount(categories)
    sums = np.bincount(categories, weights=sample.scores)
    return float((sums[sizes > 0] / sizes[sizes > 0]).mean())


def _mean_of(sample: Sample, mask: str) -> float:
    chosen = sample.scores[sample.columns[mask]]
    return float(chosen.mean()) if chosen.size else float("nan")


def _mme_columns(columns: Mapping[str, NDArray], categories: tuple[str, ...]) -> Columns:
    places = {category: place for place, category in enumerate(categories)}
    numbers = np.array([places.get(str(category), -1) for category in columns["category"]])
    return {"category": numbers, "group": np.zeros(numbers.size, dtype=np.int64)}


def _mme(sample: Sample) -> float:
    """Sum over categories of accuracy + accuracy+ in percent (accuracy+: both questions on an image are right)."""
    total = 0.0
    for category in np.unique(sample.columns["category"]):
        if category >= 0:
            rows = sample.columns["category"] == category
            part = Sample(sample.scores[rows], sample.clusters[rows], {"group": sample.columns["group"][rows]})
            total += 100 * (float(part.scores.mean()) + _all_right(part))
    return total


def _pope_columns(columns: Mapping[str, NDArray]) -> Columns:
    # A question counts once in each category that it lists: VLMEvalKit explodes "adversarial,popular".
    # A wrong answer to a "no" question is a "yes" only if it says so; an unreadable one counts as neither.
    return {
        "weight": np.array([str(category).count(",") + 1.0 for category in columns["category"]]),
        "yes": np.array([str(answer).lower() == "yes" for answer in columns["answer"]]),
        "said_yes": np.array([bool(re.search(r"\byes\b", str(t), re.IGNORECASE)) for t in columns["prediction"]]),
    }


def _pope(sample: Sample, kind: str) -> float:
    """F1, precision or recall of "yes", or accuracy."""
    weights, yes, said_yes = (sample.columns[name] for name in ("weight", "yes", "said_yes"))
    if kind == "accuracy":
        return float((weights * sample.scores).sum() / weights.sum())
    right = sample.scores == 1
    hits, misses = weights[yes & right].sum(), weights[yes & ~right].sum()
    alarms = weights[~yes & ~right & said_yes].sum()
    bottom = {"f1": 2 * hits + alarms + misses, "precision": hits + alarms, "recall": hits + misses}[kind]
    return float((2 * hits if kind == "f1" else hits) / bottom) if bottom else 0.0


def _hallusion_names(columns: Mapping[str, NDArray], place: int) -> NDArray:
    """VLMEvalKit's index holds l2-category, set, figure and question at places 2..5 between underscores."""
    cells = [str(index).split("_") for index in columns["index"]]
    return np.array(["_".join([*cell[2:4], *cell[place : place + 1]]) for cell in cells])


def _questions(columns: Mapping[str, NDArray]) -> NDArray[np.int64]:
    """The question of each rotation; what has no numeric index is its own question."""
    return _numbered(
        np.array([str(int(i) % _ROTATION) if str(i).isdigit() else str(i) for i in columns["index"]]),
    )
