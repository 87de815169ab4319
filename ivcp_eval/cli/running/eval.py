"""Run a model unpruned and pruned, and compare."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import is_file_name
from ivcp_eval.cli import notices, say
from ivcp_eval.files import DATASETS
from ivcp_eval.interface.models import QUANTISED
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.runs.planning.numbers import AMOUNT, COUNT, INDEX, SHARE
from ivcp_eval.runs.planning.options import add_flags, given_flags

if TYPE_CHECKING:
    from ivcp_eval.runs.planning.finished import Finished
    from ivcp_eval.runs.planning.plan import RunPlan
    from ivcp_eval.runs.planning.spec import Spec

DEPLOYED = "deployed"  # the method whose work a server does


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("--model", default="tiny", help="short name, see `ivcp list` (default: %(default)s)")
    add("--method", help="pruning method, or the path of a file with a class Method, e.g. "
        "./mine.py (default: ivc_prune)")  # fmt: skip
    add("--ratio", type=SHARE, default=0.5, help="share of the visual tokens kept, in (0, 1] (default: %(default)s)")
    add("--budget", default="own", metavar="KIND", help="what --ratio is a share of: own (the method's own retention "
        "ratio, as papers print it), or, so that methods cost the same, of the unpruned model's final (visual tokens "
        "after the last cut), layer_mean (processed, mean over layers) or flops (of the prefill)")  # fmt: skip
    add("--budget-prompt", type=INDEX, nargs=2, metavar=("VISUAL", "TEXT"), help="tokens of the prompt for which FLOPs "
        "are held equal (default: 1024 64)")  # fmt: skip
    add("--data", nargs="+", default=[], metavar="NAME", help="benchmarks, groups, or files of your own "
        "pictures, videos (.jsonl, .tsv); default: the shipped sets for a shipped model, else the twenty")  # fmt: skip
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="parameters of the method, e.g. layer=16")
    add("--seed", type=INDEX, default=0, help="of methods that draw (default: %(default)s)")
    add("--model-path", help="local folder with the checkpoint")
    add("--weights", choices=tuple(QUANTISED), help="store the weights so, under any method: int8 and int4 by torchao, "
        "bnb8 and bnb4 by bitsandbytes on a GPU; --model NAME@int8 is the same (default: as they are)")  # fmt: skip
    add("--base-url", metavar="URL", help="an OpenAI-compatible server that answers in place of a method, e.g. "
        "http://localhost:8000/v1, started to keep --ratio of the visual tokens; with --method none it is the "
        "unpruned model. Its key is read from SERVED_API_KEY")  # fmt: skip
    add("--served-model", metavar="NAME", help="the server's name of the model (default: the only one it lists)")
    add("--baseline-url", metavar="URL", help="a server that answers unpruned (default: the weights on this machine)")
    add(
        "--served-options", nargs="+", default=[], metavar="KEY=VALUE", help="further fields of requests to the servers"
    )
    add("--concurrency", type=COUNT, help="requests that a server is sent at once (default: 8)")
    add_flags(parser)
    add("--estimate", action="store_true", help="only say what the judge would cost at most; nothing is sent, "
        "fetched or run")  # fmt: skip
    add("--output", type=Path, help="results CSV, rows are merged into it (default: results/eval/<model>.csv)")
    add("--runs", type=Path, help="where per-sample records live (default: results/runs)")
    add("--every", type=AMOUNT, default=30.0, metavar="SECONDS", help="between two reports where the output is no "
        "terminal; 0: none (default: %(default)g)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """0 done, 1 some cells are not whole, 75 asked to stop: the same command goes on."""
    from ivcp_eval.interface.registry import absolute
    from ivcp_eval.runs.planning.cells import RUNS
    from ivcp_eval.runs.planning.finished import eval_state, known

    args.method = absolute(_method(args))
    if not (args.base_url or args.baseline_url) and (args.served_model or args.served_options or args.concurrency):
        raise ValueError("--served-model, --served-options and --concurrency say how a server is asked; add --base-url")
    if args.weights:
        args.model = f"{args.model}@{args.weights}"
    if any(map(is_file_name, args.data)):
        from ivcp_eval.vlmeval_bridge.reading.own import is_prepared, names_of

        if not (args.estimate or all(map(is_prepared, args.data))):
            from ivcp_eval.interface import models

            models.locate(args.model, args.model_path)  # nothing is prepared for a model that is not here
        args.data = names_of(args.data, notices(args))
    if args.estimate:
        return _estimate(args)
    runs = args.runs or RUNS
    name = f"{args.model}-{_digest(args)}"
    finished = known(eval_state(runs, name))
    if finished is not None:
        notices(args)("nothing to do: every cell is finished")
        return _print_table(finished)
    from ivcp_eval.runs.planning.spec import check

    return _evaluate(check(_raw(args), name), runs, args)


def _raw(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as a sweep file would: one method at one ratio, no controls."""
    from ivcp_eval.interface import models
    from ivcp_eval.interface.variants import parameter

    _, checkpoint = models.find(args.model)
    parameters = dict(parameter(text) for text in args.set)
    entry = {"method": _method(args), "ratios": [args.ratio], "budget": args.budget}
    entry["parameters"] = {key: [value] if isinstance(value, list) else value for key, value in parameters.items()}
    baseline = args.baseline_url
    if args.base_url and args.method == BASELINE:
        baseline = args.base_url
    elif args.base_url:
        entry["served"] = _server(args, args.base_url)
    if "served" not in entry:
        entry["seeds"] = [args.seed]
    model = {"path": args.model_path, "served": _server(args, baseline)} if baseline else args.model_path
    prompt = {"budget_prompt": list(args.budget_prompt)} if args.budget_prompt else {}
    return {
        "kind": "eval",
        "models": {args.model: model},
        "benchmarks": args.data or list(checkpoint.benchmarks),
        "methods": [entry],
        "controls": [],
        **prompt,
        **given_flags(args),
    }


def _method(args: argparse.Namespace) -> str:
    return args.method or (DEPLOYED if args.base_url else "ivc_prune")


def _server(args: argparse.Namespace, url: str) -> dict[str, Any]:
    """As `served` of a sweep file has it."""
    from ivcp_eval.interface.variants import parameter

    options = dict(parameter(text) for text in args.served_options)
    given = {"base_url": url, "model": args.served_model, "options": options or None, "concurrency": args.concurrency}
    return {name: value for name, value in given.items() if value is not None}


def _digest(args: argparse.Namespace) -> str:
    """Equal for equal requests; nothing is looked up for it."""
    request = {**vars(args), "data_root": os.environ.get("LMUData", "")}  # noqa: SIM112 (VLMEvalKit's name)
    identity = {key: value for key, value in request.items() if key not in ("quiet", "every", "estimate")}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _evaluate(spec: Spec, runs: Path, args: argparse.Namespace) -> int:
    from ivcp_eval.reports.table import ResultsError, read_results, update_results
    from ivcp_eval.runs.answering.samples import DeviceLost
    from ivcp_eval.runs.answering.timing import is_timed
    from ivcp_eval.runs.executors.local import run as run_local
    from ivcp_eval.runs.planning.finished import Finished, note, usual_csv
    from ivcp_eval.runs.planning.plan import make, write_manifest
    from ivcp_eval.runs.planning.uncounted import uncounted_lines
    from ivcp_eval.runs.progress.display import Progress
    from ivcp_eval.runs.records.results import collect
    from ivcp_eval.runs.records.state import reopen

    tell = notices(args)
    plan = make(spec, runs, fetch=tell)
    if not plan.models:
        raise ValueError("\n".join(_without_model(plan.problems)))
    if plan.misfits:
        raise ValueError("\n".join(plan.misfits))
    for line in plan.budgets():
        tell(line)
    for line in [*plan.notices, *uncounted_lines(cell for _, _, cell in plan.cells() if cell.finished() is None)]:
        tell(line)
    write_manifest(plan)
    csv = args.output or usual_csv(plan.runs, args.model)
    if csv.exists():  # rows cannot be merged into a damaged file; better said before anything is answered
        try:
            read_results(csv)
        except ResultsError as error:
            raise ValueError(
                f"{error}\nMend it or move it away; what was measured is kept below {plan.runs}"
            ) from error
    reopen(plan, failures=True, say=tell)  # who asks again wants another try
    finished = [cell.finished() is not None for _, _, cell in plan.cells()]
    if any(finished):
        tell(f"reusing {sum(finished)} finished of {len(finished)} cells (a cell is one variant on one benchmark)")
    try:
        n = spec.options.timing
        timed = not n or all(is_timed(cell, n) for model, _, cell in plan.cells() if model.timed([cell]))
        whole = all(finished) and timed
        if not whole and not run_local(plan, 0, Progress(plan, args.quiet, args.every), spec.options.device):
            say("stopped; run the same command again to continue")
            return 75
    except DeviceLost as lost:
        say(str(lost))
        return 75
    collected = collect(plan.state, plan.runs, csv)
    problems = [*_without_model(plan.problems), *collected.reasons("incomplete", "failed"), *collected.damaged]
    if missing := collected.missing - len(collected.damaged):
        problems.append(f"{missing} of {len(finished)} cells have no answers; the reason stands above")
    if not collected.rows:
        raise ValueError("nothing was measured: " + "; ".join(problems))
    csv.parent.mkdir(parents=True, exist_ok=True)
    update_results(csv, collected.rows)
    for problem in problems:
        say(f"NOT WHOLE: {problem}")
    if problems:
        say("run the same command again to retry what failed; finished cells are reused")
    done = Finished(csv, frozenset(row["run_id"] for row in collected.rows))
    # The source of a plug-in's method, video files and their decoder are not looked at; planning hashes them.
    plain = not any(cell.identity.method_source or cell.identity.video for _, _, cell in plan.cells())
    if plain and not problems:
        note(plan.state, done, _inputs(plan))
    _print_table(done)
    return 1 if problems else 0


def _without_model(problems: list[str]) -> list[str]:
    """A plan's problems begin with the model, of which an evaluation has one."""
    return [problem.partition(": ")[2] for problem in problems]


def _inputs(plan: RunPlan) -> Iterator[Path]:
    from ivcp_eval.benchmarks import data_file
    from ivcp_eval.runs.planning.data import path_of

    yield DATASETS  # a file more or less
    for model, benchmark, cell in plan.cells():
        yield from (path for path in model.weights.source.glob("*") if path.is_file())  # a server's are not here
        yield path_of(benchmark)
        yield from (cell.notes, cell.journal, cell.scores, cell.record, cell.predictions)
        if data_file(benchmark.name).is_file():
            yield data_file(benchmark.name)


def _print_table(finished: Finished) -> int:
    from ivcp_eval.reports.compare import compare

    try:
        comparison = compare(finished.csv, select=lambda row: row["run_id"] in finished.run_ids)
        say(f"\n{comparison.to_terminal()}")
    except ValueError as error:
        # Where every cell has a problem (said above), or only the baseline was asked for, there is no table.
        say(f"\nno comparison: {error}")
    say(f"\nresults: {finished.csv}")
    return 0


def _estimate(args: argparse.Namespace) -> int:
    from ivcp_eval.cli.setup import data
    from ivcp_eval.interface import models
    from ivcp_eval.runs.planning import cells
    from ivcp_eval.runs.records.rejudge import estimate_eval
    from ivcp_eval.vlmeval_bridge.judge import cache_folder

    _, checkpoint = models.find(args.model)
    names = [b.name for b in data.chosen(args.data or list(checkpoint.benchmarks))]
    variants = 1 if args.method == "none" else 2
    options = {name: getattr(args, name) for name in ("max_new_tokens", "limit", "judge_options")}
    known = {name: value for name, value in options.items() if value is not None}
    cache = cache_folder(args.runs or cells.RUNS)
    say(f"judge, at most: {estimate_eval(names, args.judge or '', cache, variants, **known)}")
    return 0
