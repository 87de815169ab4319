"""Rate stored predictions with another judge: no model, no GPU, and only what the cache does not know is sent."""

from __future__ import annotations

import datetime
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.files import file_digest
from ivcp_eval.reports.table import Row, read_results, read_samples, write_results, write_samples
from ivcp_eval.runs.planning import data
from ivcp_eval.vlmeval_bridge.judge.client import Judge
from ivcp_eval.vlmeval_bridge.judge.config import EXACT_MATCHING, JudgeConfig
from ivcp_eval.vlmeval_bridge.judge.estimate import Estimate, estimate
from ivcp_eval.vlmeval_bridge.judge.questions import Question

Say = Callable[[str], None]


@dataclass
class Rejudged:
    """What came of it.

    Attributes:
        csv: the new results. rated: cells that were rated anew. kept: rows that nothing is judged in, taken over.
        problems: one line for each cell that could not be rated; it keeps no score.
    """

    csv: Path
    rated: int = 0
    kept: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Cell:
    """The rows of one run of one benchmark, and its stored answers."""

    benchmark: Benchmark
    rows: list[Row]
    samples: list[Row]


def rejudge(
    results: Path,
    config: JudgeConfig | None,
    cache: Path,
    output: Path | None = None,
    only: Sequence[str] = (),
    say: Say = lambda text: None,
) -> Rejudged:
    """Write a results CSV like ``results`` whose judged benchmarks are rated by another judge.

    Args:
        results: results CSV whose rows name per-sample files.
        config: the judge; None is exact matching.
        cache: folder of the verdicts.
        output: default ``<results>.rejudged-<judge>.csv`` beside it; per-sample files go into a folder of that name.
        only: benchmarks to rate anew; the others are taken over. Empty: all that a judge can rate.

    Raises:
        FileNotFoundError: a file is missing. ValueError: the stored answers are not to the file at hand.
        JudgeError: the judge fails; nothing is written, verdicts so far are in the cache.
    """
    name = config.identity if config else EXACT_MATCHING
    rows = read_results(results)
    csv = output or results.with_name(f"{results.stem}.rejudged-{_slug(name)}.csv")
    outcome = Rejudged(csv)
    judge = Judge(config, cache) if config else None
    fresh: dict[int, list[Row]] = {}
    taken: set[int] = set()
    for cell in _cells(results, rows, only):
        first = cell.rows[0]
        say(f"{first['model']} {first['method']} on {cell.benchmark.name}: {len(cell.samples)} answers")
        rated, samples = _rated(cell, judge, name)
        path = csv.with_suffix("") / f"{rated[0]['run_id']}.csv"
        write_samples(path, samples)
        relative = os.path.relpath(path.resolve(), csv.parent.resolve())
        rated = [{**row, "predictions": Path(relative).as_posix()} for row in rated]
        if rated[0]["status"] != "ok":
            outcome.problems.append(
                f"{first['model']} {first['method']} on {cell.benchmark.name}: {rated[0]['reason']}"
            )
        places = [rows.index(row) for row in cell.rows]
        fresh[places[0]] = rated
        taken |= set(places)
        outcome.rated += 1
    written: list[Row] = []
    for place, row in enumerate(rows):
        written += fresh.get(place, []) if place in taken else [_rebased(row, results, csv)]
    outcome.kept = len(rows) - len(taken)
    write_results(csv, written)
    return outcome


def estimate_rejudge(
    results: Path,
    config: JudgeConfig,
    cache: Path,
    only: Sequence[str] = (),
    price: tuple[float, float] | None = None,
) -> Estimate:
    """What `rejudge` would send. Raises as it does, but for the judge, who is not asked."""
    judge = Judge(config, cache)
    questions = [question for cell in _cells(results, read_results(results), only) for question in _questions(cell)]
    return _estimate(judge, questions, price)


def estimate_eval(
    names: Iterable[str],
    judge_name: str,
    cache: Path,
    variants: int = 2,
    max_new_tokens: int = 512,
    limit: int | None = None,
    price: tuple[float, float] | None = None,
    judge_options: Mapping[str, Any] | None = None,
) -> Estimate:
    """The most that an evaluation can send: every answer as long as allowed, none readable without the judge.

    Args:
        names: benchmarks. judge_name: judge as the user named it; empty takes the default where one is needed.
        variants: models to evaluate, the baseline included. max_new_tokens, limit, judge_options: of the
            evaluation.

    Raises:
        DataMissing: a benchmark that is to be judged is not here; it is not fetched for this.
    """
    from ivcp_eval.vlmeval_bridge.judge.config import judge_for

    total = Estimate(0, 0, 0, 0, 0.0)
    for name in names:
        benchmark = benchmarks.load(name)
        model = judge_for(judge_name, benchmark.judge)
        if model in ("none", EXACT_MATCHING):
            continue
        dataset = _dataset(benchmark, limit)
        longest = "~" * (4 * max_new_tokens)
        answers = {str(index): longest for index in dataset.data["index"]}
        judge = Judge(JudgeConfig(model, extra=judge_options or {}), cache)
        one = _estimate(judge, _questions_to(benchmark, dataset, answers), price)
        dollars = None if one.dollars is None or total.dollars is None else total.dollars + variants * one.dollars
        total = Estimate(
            total.calls + variants * one.calls,
            0,
            total.tokens_in + variants * one.tokens_in,
            total.tokens_out + variants * one.tokens_out,
            dollars,
        )
    return total


def _estimate(judge: Judge, questions: Sequence[Question], price: tuple[float, float] | None) -> Estimate:
    unasked = judge.unasked(questions)
    known = len(questions) - len(unasked)
    return estimate(unasked.values(), known, judge.config.snapshot, price, judge.config.length)


# -- cells ----------------------------------------------------------------------------------------------------------


def _cells(results: Path, rows: Sequence[Row], only: Sequence[str]) -> Iterator[_Cell]:
    """Cells that a judge can rate and whose answers are stored."""
    declared = benchmarks.names()
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["benchmark"] in declared and row["predictions"] and (not only or row["benchmark"] in only):
            groups.setdefault((row["benchmark"], row["predictions"]), []).append(row)
    missing = sorted(set(only) - {benchmark for benchmark, _ in groups})
    if missing:
        raise ValueError(f"{results} has no row with stored answers for {', '.join(missing)}")
    for (name, predictions), members in groups.items():
        benchmark = benchmarks.load(name)
        if benchmark.judge != "none":
            yield _Cell(benchmark, members, read_samples(results.parent / predictions))


def _dataset(benchmark: Benchmark, limit: int | None = None) -> Any:
    from ivcp_eval.vlmeval_bridge import register

    data.digest(benchmark)  # VLMEvalKit would fetch a file that is not here, or is another one
    register()
    from ivcp_eval.vlmeval_bridge.evaluate import build

    return build(benchmark, limit)


def _loaded(cell: _Cell) -> Any:
    """The data set with the cell's rows, checked to be the one that was answered."""
    from ivcp_eval.vlmeval_bridge.environment import data_root

    dataset = _dataset(cell.benchmark)
    path = cell.benchmark.path or data_root() / f"{cell.benchmark.vlmeval}.tsv"
    recorded = cell.rows[0]["benchmark_sha256"]
    answered = {row["index"] for row in cell.samples}
    known = dataset.data["index"].astype(str).isin(answered)
    if (recorded and file_digest(path) != recorded) or int(known.sum()) != len(answered):
        raise ValueError(
            f"{path} is not the file to which the stored answers of {cell.benchmark.name} belong "
            f"(its SHA-256 was {recorded[:12] or 'not noted'}...); put that version back"
        )
    dataset.data = dataset.data[known]
    return dataset


def _questions(cell: _Cell) -> list[Question]:
    return _questions_to(cell.benchmark, _loaded(cell), {row["index"]: row["prediction"] for row in cell.samples})


def _questions_to(benchmark: Benchmark, dataset: Any, answers: dict[str, str]) -> list[Question]:
    from ivcp_eval.vlmeval_bridge import evaluate, judging
    from ivcp_eval.vlmeval_bridge.reading import answers as reading

    with tempfile.TemporaryDirectory() as folder:
        predictions = evaluate.stored(dataset, answers, Path(folder))
        if benchmark.thinking == "split":
            reading.split_thinking(predictions)
        return list(judging.work_of(benchmark, dataset, predictions).questions.values())


def _rated(cell: _Cell, judge: Judge | None, name: str) -> tuple[list[Row], list[Row]]:
    """New rows (one for each metric) and per-sample rows."""
    from ivcp_eval.vlmeval_bridge import evaluate
    from ivcp_eval.vlmeval_bridge.scores import ScoreMissing

    first = cell.rows[0]
    dataset = _loaded(cell)
    problem = evaluate.data_problem(cell.benchmark)
    if first["n_failed"]:
        problem = problem or f"{first['n_failed']} of {len(cell.samples)} samples have no answer"
    with tempfile.TemporaryDirectory() as folder:
        answers = {row["index"]: row["prediction"] for row in cell.samples}
        try:
            predictions = evaluate.stored(dataset, answers, Path(folder))
            scored = evaluate.score(cell.benchmark, dataset, predictions, judge)
        except ScoreMissing as error:
            scored, problem = evaluate.Scored({}, {}), f"no score: {error}"
    samples = [{**row, "score": scored.samples.get(row["index"])} for row in cell.samples]
    status = "ok" if not problem else ("incomplete" if scored.metrics else "failed")
    common = {
        **first,
        "judge": name,
        "judge_failures": scored.judge_failures,
        "status": status,
        "reason": problem or scored.remark,
        "run_id": hashlib.sha256(f"{first['run_id']}|{first['predictions']}|{name}".encode()).hexdigest()[:16],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    metrics: dict[str, tuple[float | None, float | None]] = dict(scored.metrics) or {first["metric"]: (None, None)}
    rows = [{**common, "metric": m, "score": value, "score_scale": scale} for m, (value, scale) in metrics.items()]
    return rows, samples


def _rebased(row: Row, results: Path, csv: Path) -> Row:
    """A row taken over; its per-sample file seen from the new CSV."""
    if not row["predictions"]:
        return row
    path = os.path.relpath((results.parent / row["predictions"]).resolve(), csv.parent.resolve())
    return {**row, "predictions": Path(path).as_posix()}


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() or character in "-._" else "_" for character in name)
