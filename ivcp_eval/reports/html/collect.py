"""Gathers a report's data from a results CSV; numbers are those of `compare`, `decide` and the per-sample files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ivcp_eval import benchmarks
from ivcp_eval.files import file_digest
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports import stats
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.comparison import ComparedRow, Comparison
from ivcp_eval.reports.html.model import (
    Cost,
    Mark,
    Panel,
    Pareto,
    Provenance,
    Report,
    Spread,
    Stage,
    costs_of,
)
from ivcp_eval.reports.html.samples import Pair, flips_of, of_samples
from ivcp_eval.reports.provenance import AGAIN, PLACED, NotComparable, finished_headline, grouped, variant_key
from ivcp_eval.reports.stats.timing import STAGES, Timings, paired_ratio, read_timings, saving_in_words
from ivcp_eval.reports.table import Row, read_results, runs_file
from ivcp_eval.reports.views.costs import join
from ivcp_eval.reports.views.curves import CONTROL
from ivcp_eval.reports.views.decision import Policy, decide, kv_bytes

__all__ = ["MOST_CARDS", "MOST_PICTURES", "collect"]

MOST_CARDS = 200
MOST_PICTURES = 48
_ALPHA = 0.05
_FACTS = (
    *("checkpoint", "revision", "family", "dtype", "device", "attention", "judge", "generation", "limit"),
    *("min_pixels", "max_pixels", "max_new_tokens", "ivcp_commit", "torch_version", "transformers_version"),
    *("vlmeval_version", "faithfulness", "method_source", "set_parameters", "date", "source"),
)


def collect(
    results: Path,
    policy: Policy | None = None,
    baseline: Path | None = None,
    *,
    force: bool = False,
    resamples: int = 10_000,
    cards: int = MOST_CARDS,
    command: str = "",
    bench: Sequence[Path] = (),
) -> Report:
    """Everything that a report shows.

    Args:
        results, baseline, force, resamples: as `compare` takes them. policy: without one there is no verdict.
        cards: most samples that are shown one by one. command: that makes the report.
        bench: CSV files of costs; by default the one beside the results (`costs.join`).

    Raises:
        As `compare`, `decide` and `costs.join`; ValueError: more cards than `MOST_CARDS`, or fewer than none.
    """
    if not 0 <= cards <= MOST_CARDS:
        raise ValueError(f"cards must be from 0 to {MOST_CARDS}, got {cards}")
    rows = read_results(results)
    comparison = compare(results, baseline, force=force, resamples=resamples).limits_named()
    decision = decide(results, policy, baseline, force=force, resamples=resamples, bench=bench) if policy else None
    costs = decision.costs if decision else join(comparison.rows, results, rows, bench)
    heads = [row for row in comparison.rows if row.metric == benchmarks.headline(vars(row))]
    beside = _over_random(results, rows, resamples, force)
    pruned = [row for row in heads if row.method != AGAIN]
    pairs = _pairs(pruned, results, rows, baseline or results)
    again, answered = _again(results, baseline or results, heads, resamples)
    table = rows if answered == results else read_results(answered)
    measured = of_samples(pairs, _pairs(again, answered, table, answered))
    shown = flips_of(pairs, measured, cards, min(MOST_PICTURES, cards // 3))
    return Report(
        title=results.stem,
        comparison=comparison,
        decision=decision,
        again=again,
        paretos=tuple(_pareto(model, heads, beside) for model in dict.fromkeys(row.model for row in pruned)),
        panels=_panels(heads, beside),
        flip_counts=shown.counts,
        flips=shown.flips,
        pictures=shown.pictures,
        positions=measured.positions,
        abilities=measured.abilities,
        costs=_costs(pairs),
        benched=costs,
        provenance=_provenance(results, baseline, rows, comparison, command, costs.files if costs else ()),
        unread=(*measured.unread, *shown.unread),
    )


def _again(
    results: Path, baseline: Path, heads: Sequence[ComparedRow], resamples: int
) -> tuple[tuple[ComparedRow, ...], Path]:
    """The unpruned model's second answers against its first, and the file that has them: the baseline's, if it does."""
    if results.resolve() == baseline.resolve():
        return tuple(row for row in heads if row.method == AGAIN), results
    shown = {(row.model, row.benchmark) for row in heads}

    def selected(row: Row) -> bool:
        return finished_headline(row) and row["method"] == AGAIN and (row["model"], row["benchmark"]) in shown

    for path in (baseline, results):
        with suppress(NotComparable):  # it has none
            return compare(path, resamples=resamples, select=selected).rows, path
    return (), results


# -- plots ------------------------------------------------------------------------------------------------------------

_Key = tuple[str | float | None, ...]  # `variant_key`


def _over_random(results: Path, rows: Sequence[Row], resamples: int, force: bool) -> dict[_Key, ComparedRow]:
    """The headline rows against random at the same ratio or budget, where it was measured."""
    chosen = [row for row in rows if finished_headline(row)]
    if not {row["method"] for row in chosen} - {BASELINE, AGAIN} > {CONTROL}:
        return {}
    # Holm's correction must leave room below 5 % for the smallest p-value that so many permutations can give.
    resamples = max(resamples, 40 * len(chosen))
    try:
        found = compare(results, force=force, against=CONTROL, resamples=resamples, select=finished_headline)
    except NotComparable:  # random stands at other ratios only
        return {}
    return {variant_key(row): row for row in found.rows}


def _mark(row: ComparedRow, score: Sequence[float], better: bool | None) -> Mark:
    method = f"{row.method}({row.settings})" if row.settings else row.method
    return Mark(row.variant, method, row.method == CONTROL, score[0], score[1], score[2], costs_of(row), better)


def _panels(heads: Sequence[ComparedRow], beside: Mapping[_Key, ComparedRow]) -> tuple[Panel, ...]:
    places: dict[tuple[str, str], list[ComparedRow]] = {}
    for row in heads:
        places.setdefault((row.model, row.benchmark), []).append(row)
    panels = []
    for (model, benchmark), here in places.items():
        marks = []
        for row in (row for row in here if row.method != AGAIN):
            over = beside.get(variant_key(row))
            better = None if over is None else over.p_holm < _ALPHA and over.difference > 0
            ends = [row.score_baseline + end for end in (row.difference_low, row.difference_high)]
            marks.append(_mark(row, [row.score_pruned, *ends], better))
        if marks:
            floors: dict[float, list[float]] = {}
            for row in (row for row in here if row.method != AGAIN):
                floors.setdefault(row.score_baseline, []).extend(abs(again.difference) for again in row.again)
            (baseline, floor), *others = ((score, _largest(of)) for score, of in floors.items())
            panels.append(Panel(model, benchmark, here[0].metric, baseline, floor, tuple(marks), tuple(others)))
    return tuple(panels)


def _pareto(model: str, heads: Sequence[ComparedRow], beside: Mapping[_Key, ComparedRow]) -> Pareto:
    """Means over benchmarks; their intervals are those of the benchmarks, combined as independent."""
    own = [row for row in heads if row.model == model]
    of: dict[str, list[ComparedRow]] = {}
    for row in own:
        if row.method != AGAIN:
            of.setdefault(row.variant, []).append(row)
    names = list(dict.fromkeys(row.benchmark for found in of.values() for row in found))
    whole = {name: found for name, found in of.items() if {row.benchmark for row in found} == {*names}}
    tests = {name: _over_random_p([beside.get(variant_key(row)) for row in found]) for name, found in whole.items()}
    corrected = dict(zip(tests, stats.holm([p for _, p in tests.values()]), strict=True))
    marks = []
    for name, found in whole.items():
        mean, p = tests[name][0], corrected[name]
        better = None if math.isnan(p) else bool(p < _ALPHA and mean > 0)
        mark = _mark(found[0], _mean_retained(found), better)
        shares = [costs_of(row) for row in found]
        marks.append(replace(mark, costs={c: float(np.mean([share[c] for share in shares])) for c in mark.costs}))
    floor = _largest(
        100 * abs(again.difference) / row.score_baseline for row in own if row.score_baseline for again in row.again
    )
    return Pareto(model, tuple(names), floor, tuple(marks), tuple(name for name in of if name not in whole))


def _mean_retained(rows: Sequence[ComparedRow]) -> list[float]:
    mean = float(np.mean([row.retained_percent for row in rows]))
    below = [row.retained_percent - row.retained_percent_low for row in rows]
    above = [row.retained_percent_high - row.retained_percent for row in rows]
    return [mean, mean - float(np.linalg.norm(below)) / len(rows), mean + float(np.linalg.norm(above)) / len(rows)]


def _over_random_p(rows: Sequence[ComparedRow | None]) -> tuple[float, float]:
    """Mean difference to random over benchmarks, in units of their scales, and its two-sided normal p-value."""
    known = [row for row in rows if row is not None]
    if not known or len(known) < len(rows):
        return math.nan, math.nan
    mean = float(np.mean([row.difference / row.score_scale for row in known]))
    error = float(np.linalg.norm([row.standard_error / row.score_scale for row in known])) / len(known)
    return mean, 2 * NormalDist().cdf(-abs(mean) / error) if error > 0 else math.nan


def _largest(values: Iterable[float]) -> float:
    return max(filter(math.isfinite, values), default=math.nan)


# -- samples and costs ------------------------------------------------------------------------------------------------


def _pairs(pruned: Sequence[ComparedRow], results: Path, rows: Sequence[Row], baseline: Path) -> list[Pair]:
    """The rows of the file behind each compared row: the first seed, and the unpruned model's."""
    of: dict[_Key, Row] = {}
    for group in grouped(row for row in rows if finished_headline(row)):
        of.setdefault(variant_key(group[0]), group[0])
    unpruned: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in read_results(baseline) if baseline != results else rows:
        if row["method"] == BASELINE and finished_headline(row):
            unpruned.setdefault((row["model"], row["benchmark"], row["limit"]), []).append(row)
    found = []
    for one in pruned:
        own, bases = of.get(variant_key(one)), unpruned.get((one.model, one.benchmark, one.limit), [])
        alike = [row for row in bases if all(row[name] == getattr(one, name) for name in PLACED)]
        base = next(iter(alike or bases), None)
        if own is not None and base is not None:
            found.append(Pair(one, own, _file(results, own), base, _file(baseline, base)))
    # Baseline by baseline, so that the samples of each are read once.
    return sorted(found, key=lambda pair: str(pair.baseline_file))


def _file(csv: Path, row: Row) -> Path | None:
    path = csv.parent / row["predictions"]
    return path if row["predictions"] and path.is_file() else None


@dataclass
class _Times:
    """Stage -> sample -> milliseconds, of the samples that both sides timed."""

    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]


def _costs(pairs: Sequence[Pair]) -> tuple[Cost, ...]:
    of: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        of.setdefault((pair.compared.model, pair.compared.variant), []).append(pair)
    return tuple(_cost(model, variant, found) for (model, variant), found in of.items())


def _cost(model: str, variant: str, pairs: Sequence[Pair]) -> Cost:
    rows = [pair.compared for pair in pairs]
    layers, flops, kv = (
        float(np.mean([getattr(row, name) for row in rows]))
        for name in ("ratio_layer_mean", "ratio_flops", "ratio_kv_cache")
    )
    unpruned = [kv_bytes(pair.row, pair.file) for pair in pairs]
    left = [whole * pair.compared.ratio_kv_cache for whole, pair in zip(unpruned, pairs, strict=True)]
    stages = _stages(pairs, flops)
    devices = ", ".join(dict.fromkeys(pair.row["device"] for pair in pairs if pair.row["device"]))
    words = saving_in_words(layers, {name: stage.ratio for name, stage in stages.items()})
    return Cost(model, variant, devices, layers, flops, kv, _mean(left), _mean(unpruned), stages, words)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _stages(pairs: Sequence[Pair], flops: float) -> dict[str, Stage]:
    times = _Times({}, {})
    for pair in pairs:
        after = _timings(pair.file)
        before = after and (after.of_baseline() or _timings(pair.baseline_file))
        if not after or not before or before.session != after.session:
            continue
        for stage, name in STAGES.items():
            for index, fields in after.samples.items():
                if name in fields and name in before.samples.get(index, {}):
                    at = f"{pair.compared.benchmark} {index}"
                    times.before.setdefault(stage, {})[at] = before.samples[index][name]
                    times.after.setdefault(stage, {})[at] = fields[name]
    spread = {
        stage: tuple(_spread(list(side[stage].values())) for side in (times.before, times.after))
        for stage in times.before
    }
    bounds = {"prefill": flops}
    if {"prefill", "end_to_end"} <= spread.keys():
        whole = spread["end_to_end"][0].median
        bounds["end_to_end"] = 1 - (1 - flops) * spread["prefill"][0].median / whole
    return {
        stage: Stage(before, after, paired_ratio(times.before[stage], times.after[stage]), bounds.get(stage, math.nan))
        for stage, (before, after) in spread.items()
    }


def _timings(file: Path | None) -> Timings | None:
    return None if file is None else read_timings(file.with_name("timing.json"))


def _spread(values: Sequence[float]) -> Spread:
    low, median, high = (float(value) for value in np.percentile(values, (25, 50, 75)))
    return Spread(median, low, high, len(values))


# -- provenance -------------------------------------------------------------------------------------------------------


def _provenance(
    results: Path,
    baseline: Path | None,
    rows: Sequence[Row],
    comparison: Comparison,
    command: str,
    bench: Sequence[str],
) -> Provenance:
    warnings = []
    if comparison.meaningless:
        warnings.append("Random weights: these scores mean nothing; only token counts and times are real.")
    warnings += [f"Forced although settings differ: {line}" for line in comparison.forced]
    dirty = sorted({row["run_id"] for row in rows if row["ivcp_dirty"]})
    if dirty:
        warnings.append(f"{len(dirty)} runs were made with uncommitted changes in the code.")
    several = [name for name in ("revision", "device", "dtype", "ivcp_commit") if len(_values(rows, name)) > 1]
    warnings += [f"Rows differ in {name}: {', '.join(_values(rows, name))}." for name in several]
    runs = {row["run_id"]: row for row in rows}.values()
    failed = sum(row["n_failed"] or 0 for row in runs)
    warnings += [f"{failed} answers failed and count as wrong."] if failed else []
    judged = sum(row["judge_failures"] or 0 for row in runs)
    warnings += [f"{judged} answers could not be rated by the judge."] if judged else []
    limits = _values(rows, "limit")
    warnings += [f"Only the first {limit} rows of a benchmark were asked." for limit in limits]
    unpaired = sum(not row.paired for row in comparison.rows)
    if unpaired:
        warnings.append(f"{unpaired} of {len(comparison.rows)} comparisons are not paired: no samples on both sides.")
    warnings += [f"Not compared: {line}" for line in comparison.left_out]
    files = [path for csv in (results, baseline) if csv for path in (csv, runs_file(csv)) if path.is_file()]
    files += map(Path, bench)
    facts = {name: found for name in _FACTS if (found := _values(rows, name))}
    digests = {path.as_posix(): file_digest(path) for path in files}
    return Provenance(tuple(warnings), facts, digests, command)


def _values(rows: Sequence[Row], name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(row[name]) for row in rows if row[name] not in (None, "")))
