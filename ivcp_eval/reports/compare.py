"""Compare pruned results with a baseline: what was lost, what was gained, and how sure we are.

Rows are joined on (model, benchmark, metric). Where both sides have per-sample files of the same samples, the
comparison is paired; else it is unpaired and says so. Unlike makings (judge, prompts, pixel limits, ...) are refused
unless forced.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from ivcp_eval.benchmarks.refcoco.partial import PARTIAL
from ivcp_eval.reports import stats
from ivcp_eval.reports.comparison import ComparedRow, Comparison
from ivcp_eval.reports.provenance import (
    Against,
    baseline_of,
    candidates,
    differences,
    label,
    remarks,
    sample_differences,
    unknown_provenance,
)
from ivcp_eval.reports.stats.aggregates import COLUMNS, rule_for
from ivcp_eval.reports.table import Row, read_results, read_samples

__all__ = ["ComparedRow", "Comparison", "compare"]

Samples = dict[str, Row]
# Evaluators round: half a unit of the first decimal of a percentage, and a little.
_REPRODUCED = 5.1e-4
_ALPHA = 0.05


@dataclass(frozen=True)
class _Pair:
    """Two rows to compare and, where both have per-sample files of the same samples, those."""

    baseline: Row
    pruned: Row
    samples: tuple[Samples, Samples] | None
    why_unpaired: str
    refused: tuple[str, ...]


def compare(
    results_csv: str | Path,
    baseline_csv: str | Path | None = None,
    *,
    force: bool = False,
    against: Against = "none",
    margin: float | None = None,
    resamples: int = 10_000,
    runs: Collection[str] | None = None,
) -> Comparison:
    """Compare every finished row of a results CSV with its baseline.

    Args:
        results_csv: results; pruned rows, and with another baseline file unpruned ones too.
        baseline_csv: baseline rows, ours or published; by default the unpruned rows of ``results_csv``.
        force: compare in spite of differences in the making; they are then named in the table.
        against: ``"none"``: the baseline is the unpruned model. ``"same_method"``: the row of the same method and
            ratio, to hold a reproduction against published numbers.
        margin: largest acceptable loss in percent of the metric's scale; adds a verdict per row.
        resamples: bootstrap resamples and permutations per row.
        runs: only rows of these ``run_id``; None: all.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: broken files (`results.ResultsError`), unlike makings (each named), ambiguous baselines, or nothing
            to compare.
    """
    results_csv = Path(results_csv)
    baseline_csv = results_csv if baseline_csv is None else Path(baseline_csv)
    results, baselines = read_results(results_csv), read_results(baseline_csv)
    if runs is not None:
        results, baselines = ([row for row in rows if row["run_id"] in runs] for rows in (results, baselines))
    left_out: list[str] = []
    pairs = []
    load = cache(_load)
    for row in candidates(results, baselines, own=results_csv.resolve() == baseline_csv.resolve()):
        if row["status"] != "ok":
            left_out.append(f"{label(row)}: {row['status']} ({row['reason']})")
            continue
        found = baseline_of(row, baselines, against)
        if isinstance(found, str):
            left_out.append(f"{label(row)}: {found}")
            continue
        before, why = load(baseline_csv.parent, found["predictions"])
        after, also_why = load(results_csv.parent, row["predictions"])
        pairs.append(_pair(found, row, before, after, why or also_why))
    if not pairs:
        reasons = "".join(f"\n  {line}" for line in left_out) or f"\n  {results_csv} has no pruned row"
        raise ValueError(f"nothing to compare between {results_csv} and {baseline_csv}:{reasons}")
    refused = [f"{label(pair.pruned)}: {line}" for pair in pairs for line in pair.refused]
    if refused and not force:
        raise ValueError(
            f"{results_csv} and {baseline_csv} were not made alike, so a difference would not be due to pruning:\n  "
            + "\n  ".join(refused)
            + "\nRun the baseline again in the same way, or force the comparison; the table then names the differences."
        )
    rows = [_compared(pair, margin, resamples) for pair in pairs]
    p_values = [row.p_value for row in rows]
    adjusted = zip(rows, stats.holm(p_values), stats.benjamini_hochberg(p_values), strict=True)
    rows = [replace(row, p_holm=float(a), p_benjamini_hochberg=float(b)) for row, a, b in adjusted]
    return Comparison(
        tuple(rows), str(results_csv), str(baseline_csv), tuple(left_out), tuple(refused), resamples, margin
    )


def _load(folder: Path, predictions: str) -> tuple[Samples | None, str]:
    if not predictions:
        return None, "totals only"
    path = folder / predictions
    if not path.is_file():
        return None, f"{path} is missing"
    return {row["index"]: row for row in read_samples(path)}, ""


def _pair(baseline: Row, pruned: Row, before: Samples | None, after: Samples | None, why: str) -> _Pair:
    refused = differences(baseline, pruned)
    if _partial(baseline, pruned) and (baseline["source"] or pruned["source"]):
        refused.append("a score on part of the test set against a published one on the whole")
    if before is None or after is None:
        return _Pair(baseline, pruned, None, why, tuple(refused))
    refused += sample_differences(before, after)
    if before.keys() != after.keys():
        only = len(before.keys() - after.keys()), len(after.keys() - before.keys())
        why = f"not the same samples: {only[0]} only in the baseline, {only[1]} only in the results"
        return _Pair(baseline, pruned, None, why, tuple(refused))
    return _Pair(baseline, pruned, (before, after), "", tuple(refused))


def _partial(*rows: Row) -> list[str]:
    """What the rows' reasons say of test sets that are not whole, each once."""
    said = (part for row in rows for part in row["reason"].split("; ") if part.startswith(PARTIAL))
    return list(dict.fromkeys(said))


def _compared(pair: _Pair, margin: float | None, resamples: int) -> ComparedRow:
    baseline, pruned = pair.baseline, pair.pruned
    notes = [f"differs, forced: {line}" for line in pair.refused]
    notes += [f"!!! PARTIAL DATA: {line} !!!" for line in _partial(baseline, pruned)]
    notes += [f"differs: {line}" for line in remarks(baseline, pruned)]
    unknown = unknown_provenance(baseline, pruned)
    notes += [f"not stated by the published row: {', '.join(unknown)}"] if unknown else []
    if baseline["score_scale"] != pruned["score_scale"]:
        raise ValueError(
            f"{label(pruned)}: the scales of the scores differ, {baseline['score_scale']:g} and "
            f"{pruned['score_scale']:g}; convert one of the files"
        )
    row = _skeleton(baseline, pruned)
    why = pair.why_unpaired
    if pair.samples:
        paired = _paired(row, pair.samples, resamples)
        if isinstance(paired, ComparedRow):
            return _finished(paired, margin, notes)
        why = paired
    return _finished(_unpaired(row, baseline, pruned, why), margin, notes)


def _skeleton(baseline: Row, pruned: Row) -> ComparedRow:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    def time_ratio(name: str) -> float:
        same = all(baseline[c] and baseline[c] == pruned[c] for c in ("device", "dtype", "attention"))
        return pruned[name] / baseline[name] if same and baseline[name] and pruned[name] is not None else math.nan

    before, after = baseline["score"], pruned["score"]
    failed = max(baseline["n_failed"] or 0, pruned["n_failed"] or 0)
    return ComparedRow(
        model=pruned["model"],
        benchmark=pruned["benchmark"],
        metric=pruned["metric"],
        method=pruned["method"],
        method_parameters=pruned["method_parameters"],
        preset=pruned["preset"],
        seed=pruned["seed"],
        baseline_method=baseline["method"],
        baseline_source=baseline["source"],
        source=pruned["source"],
        ratio_asked=number(pruned["ratio_asked"]),
        ratio_kept_final=number(pruned["ratio_kept_final"]),
        ratio_layer_mean=number(pruned["ratio_layer_mean"]),
        ratio_kv_cache=number(pruned["ratio_kv_cache"]),
        budget=pruned["budget"],
        ratio_method=number(pruned["ratio_method"]),
        ratio_flops=number(pruned["ratio_flops"]),
        score_scale=pruned["score_scale"],
        score_baseline=before,
        score_pruned=after,
        difference=after - before,
        retained_percent=100 * after / before if before else math.nan,
        prefill_time_ratio=time_ratio("prefill_ms_median"),
        decode_time_ratio=time_ratio("decode_ms_per_token_median"),
        trained_weights=baseline["trained_weights"] is not False and pruned["trained_weights"] is not False,
        notes=(f"up to {failed} samples without a usable answer",) if failed else (),
    )


def _paired(row: ComparedRow, samples: tuple[Samples, Samples], resamples: int) -> ComparedRow | str:
    """The row with its paired statistics, or why the per-sample scores do not give this metric."""
    rule = rule_for(row.benchmark, row.metric, row.score_scale)
    before = samples[0]
    of_metric = _of_category(before, row.metric)
    columns = [_columns(one, of_metric) for one in samples]
    old, new = (rule.scores(one) for one in columns)
    scored = ~np.isnan(old + new)
    if not scored.any():
        return "no sample has a score of its own"
    old, new = old[scored], new[scored]
    columns = [{name: values[scored] for name, values in one.items()} for one in columns]
    given = np.array([before[i]["cluster"] or f"index {i}" for i in columns[0]["index"]])
    # One seed per row, whatever the order of the file.
    name = f"{row.model}|{row.benchmark}|{row.metric}|{row.method}|{row.ratio_asked}|{row.method_parameters}"
    name += f"|{row.budget}" if row.budget else ""
    result = stats.paired_bootstrap(
        old,
        new,
        rule.clusters(columns[0], given),
        aggregate=rule.aggregate,
        columns=rule.prepare(columns[0]),
        pruned_columns=rule.prepare(columns[1]),
        scale=row.score_scale,
        resamples=resamples,
        seed=zlib.crc32(name.encode()),
    )
    for got, stated in ((result.baseline, row.score_baseline), (result.pruned, row.score_pruned)):
        if abs(got - stated) > _REPRODUCED * row.score_scale:
            return f"the per-sample scores give {got:.6g}, not the reported {stated:.6g}"
    changed = stats.flips(old, new, *(one["prediction"].tolist() for one in columns))
    # McNemar's test needs independent samples and an average of their verdicts.
    independent = result.n_clusters == result.n_samples and rule.aggregate is None
    exact = independent and not changed.graded
    unscored = len(of_metric) - int(scored.sum())
    notes = (
        *row.notes,
        *result.notes,
        *([f"{unscored} samples without a score of their own left out"] if unscored else []),
    )
    return replace(
        row,
        paired=True,
        difference_low=result.difference_interval.low,
        difference_high=result.difference_interval.high,
        retained_percent_low=100 * result.retained_interval.low,
        retained_percent_high=100 * result.retained_interval.high,
        right_to_wrong=changed.right_to_wrong,
        wrong_to_right=changed.wrong_to_right,
        answers_changed=changed.answers_changed,
        graded=changed.graded,
        n_samples=result.n_samples,
        n_clusters=result.n_clusters,
        standard_error=result.standard_error,
        test="McNemar" if exact else "permutation",
        p_value=stats.mcnemar(old, new).p_value if exact else result.p_value,
        notes=notes,
    )


def _of_category(samples: Samples, metric: str) -> list[str]:
    """Indices of the samples that a metric is about: those of the category it is named after, else all."""
    named = [index for index, row in samples.items() if row["category"].lower() == metric.lower()]
    return named or list(samples)


def _columns(samples: Samples, indices: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: np.array([samples[i][name] for i in indices], dtype=object) for name in COLUMNS}


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
    return row if margin is None else replace(row, verdict=_verdict(row, margin * row.score_scale / 100))


def _verdict(row: ComparedRow, margin: float) -> stats.Verdict:
    if row.paired and row.difference_low == row.difference_high and row.n_clusters:
        # No score differed: the bootstrap cannot know what it has not seen, the rule of three can.
        unseen = 3 / row.n_clusters * row.score_scale
        return "not worse" if unseen < margin else "undecided"
    return stats.non_inferiority(stats.Interval(row.difference_low, row.difference_high), margin)
