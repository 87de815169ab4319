"""Compare pruned results with a baseline: what was lost, what was gained, and how sure we are.

Rows are joined on (model, benchmark, metric); the seeds of a method that draws are one row. Where both sides have
per-sample files of the same samples, the comparison is paired; else it is unpaired and says so. Different settings
(judge, prompts, pixel limits, ...) are refused unless forced.

This is the one comparison of the project: curves and the sensitivity page are views of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from ivcp_eval.benchmarks.refcoco.partial import PARTIAL
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports import stats
from ivcp_eval.reports.comparison import ComparedRow, Comparison, NoiseFloor
from ivcp_eval.reports.provenance import (
    AGAIN,
    PLACED,
    Against,
    Group,
    NotComparable,
    Telling,
    baseline_of,
    candidates,
    described,
    differences,
    grouped,
    label,
    merged,
    one_reference,
    remarks,
    sample_differences,
    settings,
    telling_parameters,
    unknown_provenance,
    why_none,
)
from ivcp_eval.reports.stats.paired import PairedMetric, Samples, paired_metric
from ivcp_eval.reports.stats.ranks import ranked
from ivcp_eval.reports.stats.timing import Timings, read_timings, time_ratios
from ivcp_eval.reports.table import Row, read_results

__all__ = ["ComparedRow", "Comparison", "compare"]

_ALPHA = 0.05
#: Files of samples that stay in memory: the baseline's, and the seeds of the variants at hand.
_MOST_FILES = 8
#: Sums of clusters that wait for their resamples, in numbers: 128 MB.
_MOST_SUMS = 16_000_000

Load = Callable[[Path, str], tuple[Samples | None, str]]


@dataclass(frozen=True)
class _Pair:
    """Two groups of rows to compare.

    Attributes:
        metric: what their samples say, or why the comparison is not paired.
        refused: what forbids the comparison; of forbidden ones nothing is read from samples.
        timings: of the first seed of each, where they were measured.
    """

    baseline: Group
    pruned: Group
    metric: PairedMetric | str
    refused: tuple[str, ...]
    timings: tuple[Timings | None, Timings | None]


@dataclass
class _Waiting:
    """Pairs that wait for their resamples, and the rows that were made of others.

    Attributes:
        rows: place in the results -> the finished row. pairs: what waits, each with its place.
    """

    resamples: int
    margin: float | None
    rows: dict[int, ComparedRow] = field(default_factory=dict)
    pairs: list[tuple[int, _Pair]] = field(default_factory=list)

    def add(self, place: int, pair: _Pair) -> None:
        """Keep a pair; where many wait, finish them, so that memory does not grow with the variants."""
        self.pairs.append((place, pair))
        if sum(metric.sums.size for metric in self._metrics) > _MOST_SUMS:
            self.finish()

    def finish(self) -> None:
        """Compare what waits."""
        results = iter(stats.paired_bootstraps(self._metrics, resamples=self.resamples))
        for place, pair in self.pairs:
            result = next(results) if isinstance(pair.metric, PairedMetric) else None
            self.rows[place] = _compared(pair, result, self.margin)
        self.pairs.clear()

    @property
    def _metrics(self) -> list[stats.Paired]:
        return [pair.metric.paired for _, pair in self.pairs if isinstance(pair.metric, PairedMetric)]


def compare(
    results_csv: str | Path,
    baseline_csv: str | Path | None = None,
    *,
    force: bool = False,
    against: Against = "none",
    margin: float | None = None,
    resamples: int = 10_000,
    select: Callable[[Row], bool] = lambda row: True,
) -> Comparison:
    """Compare every finished row of a results CSV with its baseline.

    Args:
        results_csv: results; pruned rows, and with another baseline file unpruned ones too.
        baseline_csv: baseline rows, ours or published; by default rows of ``results_csv``.
        force: compare in spite of different settings; they are then named in the table.
        against: which rows are the baseline: ``"none"``, the unpruned model; ``"same_method"``, the row of the same
            method and ratio, to hold a reproduction against published numbers; ``"full"``, of models with quantised
            weights the unpruned model of full ones; the name of a method, its row at the
            same ratio or budget (``"random"``: is it better than chance?); ``"METHOD:RATIO"``, one variant for all
            rows, which are then ranked; or a `Reference`, a method with parameters.
        margin: largest acceptable loss in percent of the metric's scale; adds a verdict per row.
        resamples: bootstrap resamples and permutations per row.
        select: which pruned rows are compared.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: broken files (`table.ResultsError`), unequal scales, or `NotComparable`: different settings (each
            named), ambiguous baselines, or nothing to compare.
    """
    results_csv = Path(results_csv)
    baseline_csv = results_csv if baseline_csv is None else Path(baseline_csv)
    results, baselines = read_results(results_csv), read_results(baseline_csv)
    skipped: list[tuple[Row, str]] = []
    pairs: list[tuple[Group, Group]] = []
    folders = baseline_csv.parent, results_csv.parent
    own = results_csv.resolve() == baseline_csv.resolve()
    chosen = [row for row in candidates(results, baselines, against, own=own) if select(row)]
    skipped += [(row, f"{row['status']} ({row['reason']})") for row in chosen if row["status"] != "ok"]
    known = grouped(baselines)
    for group in grouped(row for row in chosen if row["status"] == "ok"):
        baseline = baseline_of(group, known, against)
        if isinstance(baseline, str):
            skipped.append((merged(group), baseline))
        else:
            pairs.append((baseline, group))
    comparison = Comparison(
        rows=(),
        results=str(results_csv),
        baseline=str(baseline_csv),
        against=described(against),
        skipped=tuple(skipped),
        overridden=(),
        resamples=resamples,
        margin=margin,
    )
    if not pairs:
        reasons = "".join(f"\n  {line}" for line in comparison.left_out) or f"\n  {results_csv}: {why_none(results)}"
        raise NotComparable(f"nothing to compare between {results_csv} and {baseline_csv}:{reasons}")
    load, waiting, refused_of = lru_cache(_MOST_FILES)(partial(_load, {})), _Waiting(resamples, margin), {}
    # Baseline by baseline, so that the samples of each are read once.
    for place in sorted(range(len(pairs)), key=lambda i: pairs[i][0][0]["predictions"]):
        pair = _pair(*pairs[place], folders, load, force)
        refused_of[place] = [(merged(pair.pruned), line) for line in pair.refused]
        if force or not pair.refused:
            waiting.add(place, pair)
    comparison = replace(
        comparison, overridden=tuple(line for place in range(len(pairs)) for line in refused_of[place])
    )
    if comparison.overridden and not force:
        raise NotComparable(
            f"{results_csv} and {baseline_csv} were made with different settings, so a difference would not be due to "
            "pruning:\n  "
            + "\n  ".join(comparison.forced)
            + "\nRun the baseline again in the same way, or force the comparison; the table then names the differences."
        )
    waiting.finish()
    telling = telling_parameters(results)
    rows = [
        replace(waiting.rows[place], settings=settings(pruned[0], telling)) for place, (_, pruned) in enumerate(pairs)
    ]
    sides = [(baselines, folders[0]), *([] if own else [(results, folders[1])])]
    floors = _noise_floors(sides, [baseline[0] for baseline, _ in pairs], telling, load)
    rows = [replace(row, again=() if row.method == AGAIN else of) for row, of in zip(rows, floors, strict=True)]
    # The baseline against itself is no hypothesis about a method.
    p_values = [math.nan if row.method == AGAIN else row.p_value for row in rows]
    adjusted = zip(rows, stats.holm(p_values), stats.benjamini_hochberg(p_values), strict=True)
    rows = [replace(row, p_holm=float(a), p_benjamini_hochberg=float(b)) for row, a, b in adjusted]
    if one_reference(against):
        rows = ranked(rows)
    return replace(comparison, rows=tuple(rows))


def _noise_floors(
    sides: Sequence[tuple[Sequence[Row], Path]], baselines: Sequence[Row], telling: Telling, load: Load
) -> list[tuple[NoiseFloor, ...]]:
    """What the unpruned model's second answers say beside each of ``baselines``, where there are any: whatever rows are
    compared, and with what.

    Args:
        sides: rows of a file and its folder; the first that has second answers to the same questions counts.
    """
    floors: dict[tuple[Any, ...], list[tuple[Row, NoiseFloor]]] = {}
    questions = {_question(row) for row in baselines}
    for rows, folder in sides:
        own = [row for row in rows if row["method"] in (BASELINE, AGAIN) and row["status"] == "ok"]
        found: dict[tuple[Any, ...], list[tuple[Row, NoiseFloor]]] = {}
        groups = grouped(row for row in own if _question(row) in questions - floors.keys())
        for group in (group for group in groups if group[0]["method"] == AGAIN):
            with suppress(NotComparable):  # nobody knows to which of several first answers these are the second
                first = baseline_of(group, groups, "none")
                if not isinstance(first, str):
                    pair = _pair(first, group, (folder, folder), load, force=False)
                    if not pair.refused:
                        found.setdefault(_question(group[0]), []).append((first[0], _noise_floor(pair, telling)))
        floors |= found
    beside = []
    for row in baselines:
        known = floors.get(_question(row), [])
        alike = [floor for first, floor in known if all(first[name] == row[name] for name in PLACED)]
        beside.append(tuple(alike or [floor for _, floor in known]))
    return beside


def _question(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "benchmark", "metric", "limit"))


def _noise_floor(pair: _Pair, telling: Telling) -> NoiseFloor:
    difference = merged(pair.pruned)["score"] - merged(pair.baseline)["score"]
    changed = None if isinstance(pair.metric, str) else pair.metric.flips.answers_changed
    return NoiseFloor(settings(pair.pruned[0], telling), difference, changed)


def _load(known: dict[str, dict[str, Any]], folder: Path, predictions: str) -> tuple[Samples | None, str]:
    if not predictions:
        return None, "totals only"
    path = folder / predictions
    if not path.is_file():
        return None, f"{path} is missing"
    return Samples.read(path, known), ""


def _pair(baseline: Group, pruned: Group, folders: tuple[Path, Path], load: Load, force: bool) -> _Pair:
    refused = dict.fromkeys(line for before in baseline for after in pruned for line in differences(before, after))
    if _partial(*baseline, *pruned) and any(row["source"] for row in (*baseline, *pruned)):
        refused["a score on part of the test set against a published one on the whole"] = None
    loaded = [
        [load(folder, row["predictions"]) for row in g] for folder, g in zip(folders, (baseline, pruned), strict=True)
    ]
    why = next((why for side in loaded for samples, why in side if samples is None), "")
    sides = [[samples for samples, _ in side if samples is not None] for side in loaded]
    if not why:
        first, *others = (samples for side in sides for samples in side)
        for other in others:
            both = first.shared(other)
            refused |= dict.fromkeys(sample_differences(both[0].columns, both[1].columns))
            only = len(first) - len(both[0]), len(other) - len(both[0])
            if any(only) and not why:
                why = f"not the same samples: {only[0]} only in the baseline, {only[1]} only in the results"
    metric: PairedMetric | str = why
    if not why and (force or not refused):
        metric = paired_metric(
            pruned[0]["benchmark"],
            pruned[0]["metric"],
            pruned[0]["score_scale"],
            [first.shared(samples)[1] for samples in sides[0]],
            [first.shared(samples)[1] for samples in sides[1]],
            ([r["score"] for r in baseline], [r["score"] for r in pruned]),
        )
    timings = _timings(folders[0], baseline[0]), _timings(folders[1], pruned[0])
    same_model = baseline[0]["model"] == pruned[0]["model"]
    if same_model and baseline[0]["method"] == BASELINE and timings[1] is not None:
        # The unpruned model may have been timed again since, beside another variant.
        timings = timings[1].of_baseline() or timings[0], timings[1]
    return _Pair(baseline, pruned, metric, tuple(refused), timings)


def _timings(folder: Path, row: Row) -> Timings | None:
    return read_timings((folder / row["predictions"]).with_name("timing.json")) if row["predictions"] else None


def _partial(*rows: Row) -> list[str]:
    """What the rows' reasons say of test sets that are not whole, each once."""
    said = (part for row in rows for part in row["reason"].split("; ") if part.startswith(PARTIAL))
    return list(dict.fromkeys(said))


def _compared(pair: _Pair, result: stats.PairedResult | None, margin: float | None) -> ComparedRow:
    """``result``: of the resamples, where the pair has a metric."""
    baseline, pruned = merged(pair.baseline), merged(pair.pruned)
    if baseline["score_scale"] != pruned["score_scale"]:
        raise ValueError(
            f"{label(pruned)}: the scales of the scores differ, {baseline['score_scale']:g} and "
            f"{pruned['score_scale']:g}; convert one of the files"
        )
    row = _skeleton(baseline, pruned, pair)
    if result is None or isinstance(pair.metric, str):
        row = _unpaired(row, baseline, pruned, str(pair.metric))
    else:
        row = _paired(row, pair.metric, result)
    return _finished(row, margin, _notes(pair, baseline, pruned))


def _notes(pair: _Pair, baseline: Row, pruned: Row) -> list[str]:
    notes = [f"differs, forced: {line}" for line in pair.refused]
    notes += [f"!!! PARTIAL DATA: {line} !!!" for line in _partial(baseline, pruned)]
    notes += [f"differs: {line}" for line in remarks(baseline, pruned)]
    unknown = unknown_provenance(baseline, pruned)
    notes += [f"not stated by the published row: {', '.join(unknown)}"] if unknown else []
    limits = {row["limit"] for row in (baseline, pruned) if row["limit"]}
    return notes + [f"only the first {limit} rows of the benchmark were asked" for limit in sorted(limits)]


def _skeleton(baseline: Row, pruned: Row, pair: _Pair) -> ComparedRow:
    """The row without its statistics."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    before, after = baseline["score"], pruned["score"]
    failed = max(row["n_failed"] or 0 for row in (*pair.baseline, *pair.pruned))
    scores = [row["score"] for row in pair.pruned]
    return ComparedRow(
        model=pruned["model"],
        benchmark=pruned["benchmark"],
        metric=pruned["metric"],
        method=pruned["method"],
        method_parameters=pruned["method_parameters"],
        preset=pruned["preset"],
        **{name: pruned[name] for name in PLACED},
        seed=pruned["seed"],
        n_seeds=len(pair.pruned),
        baseline_method=baseline["method"],
        baseline_source=baseline["source"],
        source=pruned["source"],
        limit=pruned["limit"],
        ratio_asked=number(pruned["ratio_asked"]),
        ratio_kept_final=number(pruned["ratio_kept_final"]),
        ratio_layer_mean=number(pruned["ratio_layer_mean"]),
        ratio_kv_cache=number(pruned["ratio_kv_cache"]),
        baseline_ratio_layer_mean=number(baseline["ratio_layer_mean"]),
        budget=pruned["budget"],
        ratio_method=number(pruned["ratio_method"]),
        ratio_flops=number(pruned["ratio_flops"]),
        score_scale=pruned["score_scale"],
        score_baseline=before,
        score_pruned=after,
        score_lowest_seed=min(scores),
        score_highest_seed=max(scores),
        difference=after - before,
        retained_percent=100 * after / before if before else math.nan,
        times=time_ratios(*pair.timings),
        trained_weights=baseline["trained_weights"] is not False and pruned["trained_weights"] is not False,
        n_samples=pruned["n_samples"],
        notes=(f"up to {failed} samples without a usable answer",) if failed else (),
    )


def _paired(row: ComparedRow, metric: PairedMetric, result: stats.PairedResult) -> ComparedRow:
    changed = metric.flips
    notes = [*row.notes, *result.notes]
    notes += [f"{metric.unscored} samples without a score of their own left out"] if metric.unscored else []
    return replace(
        row,
        paired=True,
        difference_low=result.difference_interval.low,
        difference_high=result.difference_interval.high,
        retained_percent_low=100 * result.retained_interval.low,
        retained_percent_high=100 * result.retained_interval.high,
        right_to_wrong=changed.right_to_wrong,
        wrong_to_right=changed.wrong_to_right,
        answers_changed=changed.answers_changed if row.n_seeds == 1 else None,
        graded=changed.graded,
        n_samples=result.n_samples,
        n_clusters=result.n_clusters,
        standard_error=result.standard_error,
        test="permutation" if metric.mcnemar is None else "McNemar",
        p_value=result.p_value if metric.mcnemar is None else metric.mcnemar,
        notes=tuple(notes),
    )


def _unpaired(row: ComparedRow, baseline: Row, pruned: Row, why: str) -> ComparedRow:
    notes = [*row.notes, f"unpaired: {why}"]
    sizes = [baseline["n_samples"], pruned["n_samples"]]
    known = next((size for size in sizes if size), None)
    if known and not all(sizes):
        notes.append(f"the published row does not state its number of samples; {known} assumed, as on the other side")
    of_shares = row.score_scale in (1, 100) or row.score_scale == known
    if not known or not of_shares:
        reason = "no number of samples is known" if not known else "the metric is not a mean of shares"
        return replace(row, notes=(*notes, f"no interval: {reason}"))
    result = stats.unpaired_interval(
        row.score_baseline, sizes[0] or known, row.score_pruned, sizes[1] or known, scale=row.score_scale
    )
    return replace(
        row,
        difference_low=result.difference_interval.low,
        difference_high=result.difference_interval.high,
        retained_percent_low=100 * result.retained_interval.low,
        retained_percent_high=100 * result.retained_interval.high,
        n_samples=pruned["n_samples"] or known,
        n_clusters=pruned["n_clusters"],
        standard_error=result.standard_error,
        test="unpaired z",
        p_value=result.p_value,
        notes=tuple(notes),
    )


def _finished(row: ComparedRow, margin: float | None, notes: Sequence[str]) -> ComparedRow:
    smallest = stats.minimal_detectable_effect(row.standard_error, alpha=_ALPHA)
    row = replace(row, minimal_detectable_effect=smallest, notes=(*row.notes, *notes))
    return row if margin is None else replace(row, verdict=_verdict(row, margin))


def _verdict(row: ComparedRow, margin: float) -> Literal["not worse", "worse", "undecided"]:
    """By the tests of `decide`, each one-sided at half of the interval's error, uncorrected."""
    test = row.loss_test(margin)
    if test is None:
        return "undecided"
    return "not worse" if test.p_not_worse <= _ALPHA / 2 else "worse" if test.p_worse <= _ALPHA / 2 else "undecided"
