"""The ``ivcp`` command. Verbs import what they need when they run, so that ``--help`` and ``list`` stay light."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import ivcp_eval

# Verbs that live in a module of their own with `add_arguments(parser)` and `run(args) -> int`.
_MODULES: dict[str, tuple[str, str]] = {
    "sweep": ("ivcp_eval.cli.running.sweep", "plan and run many variants on many benchmarks, resumable"),
    "check-model": ("ivcp_eval.cli.setup.check_model", "check a model's wiring on its real weights"),
    "data": ("ivcp_eval.cli.setup.data", "show which benchmark files are here, or fetch them"),
    "method": ("ivcp_eval.cli.setup.method", "write a new method's template, or run the contract on a method"),
    "rejudge": ("ivcp_eval.cli.running.rejudge", "score stored predictions with another judge, without a GPU"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 some cells are not whole, 2 the request cannot be carried out."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["vlmeval"], ["bench"]):
        # What follows belongs to another parser, and argparse refuses to hand on leading options.
        verb, rest = (_vlmeval if arguments[0] == "vlmeval" else _bench), arguments[1:]
        return _guarded(lambda: verb(rest[1:] if rest[:1] == ["--"] else rest))
    if arguments[:1] and arguments[0] in _MODULES:
        return _guarded(lambda: _module_verb(arguments[0], arguments[1:]))
    args = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    return _guarded(lambda: run(args))


def _module_verb(name: str, arguments: list[str]) -> int:
    module = import_module(_MODULES[name][0])
    parser = argparse.ArgumentParser(prog=f"ivcp {name}", description=_MODULES[name][1])
    module.add_arguments(parser)
    done: int = module.run(parser.parse_args(arguments))
    return done


def _guarded(verb: Callable[[], int]) -> int:
    from ivcp_eval.interface.models import MissingWeights

    try:
        return verb()
    except (ValueError, MissingWeights, FileNotFoundError, ImportError) as error:
        print(f"ivcp: {error}", file=sys.stderr)  # noqa: T201
    except (OSError, RuntimeError) as error:
        print(f"ivcp: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
    except KeyboardInterrupt:
        print("ivcp: interrupted; run the same command again to continue", file=sys.stderr)  # noqa: T201
        return 130
    return 2


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


# -- parser ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ivcp", description=(ivcp_eval.__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="version", version=f"ivcp-eval {ivcp_eval.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser("eval", help="run a model unpruned and pruned, and compare")
    _add_eval(verb)
    verb.set_defaults(run=_eval)

    verb = verbs.add_parser("list", help="show models, methods and benchmarks")
    for what in ("models", "methods", "benchmarks"):
        verb.add_argument(f"--{what}", action="store_true", help=f"only the {what}")
    verb.set_defaults(run=_list)

    verb = verbs.add_parser("compare", help="compare a results CSV with a baseline CSV")
    verb.add_argument("results", type=Path, help="results CSV")
    verb.add_argument("baseline", type=Path, nargs="?", help="baseline CSV; default: the unpruned rows of RESULTS")
    verb.add_argument("--force", action="store_true", help="compare although judge, prompts, pixels or versions differ")
    verb.add_argument("--against", choices=("none", "same_method"), default="none", help="which rows of BASELINE count")
    verb.add_argument("--margin", type=float, help="points that may be lost; adds a verdict per row")
    verb.add_argument(
        "--resamples", type=int, default=10_000, help="bootstrap resamples of a row (default: %(default)s)"
    )
    verb.add_argument("--output", type=Path, help="also write the comparison as CSV")
    verb.set_defaults(run=_compare)

    # Those below are handled before this parser is used, so that --help imports nothing.
    verbs.add_parser("bench", help="time pruning beside its FLOP bound")
    verbs.add_parser("vlmeval", help="VLMEvalKit's own runner, our models and benchmarks registered")
    for name, (_, text) in _MODULES.items():
        verbs.add_parser(name, help=text)
    return parser


def _add_eval(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("--model", default="tiny", help="short name, see `ivcp list` (default: %(default)s)")
    add("--method", default="ivc_prune", help="pruning method (default: %(default)s)")
    add("--ratio", type=float, default=0.5, help="share of the visual tokens kept, in (0, 1] (default: %(default)s)")
    add("--budget", default="own", metavar="KIND", help="what --ratio is a share of: own (the method's own retention "
        "ratio, as papers print it), or, so that methods cost the same, of the unpruned model's final (visual tokens "
        "after the last cut), layer_mean (processed, mean over layers) or flops (of the prefill)")  # fmt: skip
    add("--budget-prompt", type=int, nargs=2, metavar=("VISUAL", "TEXT"), help="tokens of the prompt for which FLOPs "
        "are held equal (default: 1024 64)")  # fmt: skip
    add("--data", nargs="+", default=[], metavar="NAME", help="benchmarks or groups; default: the shipped sets for a "
        "shipped model, else the matrix of twenty")  # fmt: skip
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="parameters of the method, e.g. layer=16")
    add("--seed", type=int, default=0, help="of methods that draw (default: %(default)s)")
    add("--model-path", help="local folder with the checkpoint")
    add("--limit", type=int, help="only the first N rows of each benchmark")
    add("--judge", default="", help="judge model, or exact_matching; default: gpt-4o where a benchmark needs a judge")
    add("--judge-url", default="", help="its OpenAI-compatible endpoint (default: $OPENAI_BASE_URL, else OpenAI's)")
    add("--estimate", action="store_true", help="only say what the judge would cost at most; nothing is sent or run")
    add("--device", default="", help="cuda, cuda:1, cpu, or auto for all GPUs; default: cuda if there is one")
    add("--dtype", default="", help="default: bfloat16 on a GPU, float32 on a CPU")
    add("--attention", default="", help="sdpa, eager, flash_attention_2; default: the fastest installed")
    add("--min-pixels", type=int, help="default: the family's published limit")
    add("--max-pixels", type=int, help="default: the family's published limit")
    add("--max-new-tokens", type=int, help="default: the family's published limit")
    add("--timeout", type=float, metavar="S", help="seconds that one answer may take; a late one is an error of its "
        "sample, which the next run retries (default: no limit but --max-new-tokens)")  # fmt: skip
    add("--trust-remote-code", action="store_true", help="allow a checkpoint's own code to run")
    add("--output", type=Path, help="results CSV (default: results/eval/<variant>.csv)")
    add("--runs", type=Path, help="where per-sample records live (default: results/runs)")
    add("--no-timing", action="store_true", help="leave times and dates out: equal runs are then equal bytes")


# -- verbs ----------------------------------------------------------------------------------------------------------


def _eval(args: argparse.Namespace) -> int:
    from ivcp_eval.engine import check_ratio
    from ivcp_eval.interface.failures import check_timeout
    from ivcp_eval.interface.registry import make_method
    from ivcp_eval.interface.variants import Budget, Variant
    from ivcp_eval.runs import cells
    from ivcp_eval.runs.planning import Request
    from ivcp_eval.runs.runner import evaluate

    check_ratio(args.ratio)
    check_timeout(args.timeout)
    if args.estimate:
        return _estimate(args)
    parameters = dict(_parameter(text) for text in args.set)
    make_method(args.method, parameters)
    budget = Budget.of(args.budget, args.ratio, args.budget_prompt and tuple(args.budget_prompt))
    request = Request(
        variant=Variant(args.model, args.method, args.ratio, parameters, args.seed, budget),
        data=tuple(args.data),
        model_path=args.model_path,
        limit=args.limit,
        judge=args.judge,
        judge_url=args.judge_url,
        device=args.device,
        dtype=args.dtype,
        attention=args.attention,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        max_new_tokens=args.max_new_tokens,
        trust_remote_code=args.trust_remote_code,
        timeout=args.timeout,
        runs=args.runs or cells.RUNS,
        output=args.output,
        timing=not args.no_timing,
    )
    outcome = evaluate(request, _say)
    for problem in outcome.problems:
        _say(f"NOT WHOLE: {problem}")
    if outcome.problems:
        _say("run the same command again to retry what failed; finished cells are reused")
    from ivcp_eval.reports.compare import compare

    try:
        _say(f"\n{compare(outcome.csv).to_terminal()}")
    except ValueError as error:
        # Where every cell has a problem (said above), or only the baseline was asked for, there is no table.
        _say(f"\nno comparison: {error}")
    _say(f"\nresults: {outcome.csv}")
    return 1 if outcome.problems else 0


def _estimate(args: argparse.Namespace) -> int:
    from ivcp_eval.cli.setup import data
    from ivcp_eval.interface import models
    from ivcp_eval.runs import cells
    from ivcp_eval.runs.rejudge import estimate_eval
    from ivcp_eval.vlmeval_bridge.judge import cache_folder

    _, checkpoint = models.find(args.model)
    names = [b.name for b in data.chosen(args.data or ["embedded" if checkpoint.local else "matrix"])]
    variants = 1 if args.method == "none" else 2
    options = {"max_new_tokens": args.max_new_tokens, "limit": args.limit}
    known = {name: value for name, value in options.items() if value is not None}
    cache = cache_folder(args.runs or cells.RUNS)
    _say(f"judge, at most: {estimate_eval(names, args.judge, cache, variants, **known)}")
    return 0


def _parameter(text: str) -> tuple[str, Any]:
    """``key=value``; the value is JSON where it is JSON, else text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"parameter {text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, {"True": True, "False": False, "None": None}.get(value, value)


def _list(args: argparse.Namespace) -> int:
    from tabulate import tabulate

    from ivcp_eval import benchmarks
    from ivcp_eval.interface import cards, models

    every = not (args.models or args.methods or args.benchmarks)
    if args.models or every:
        rows = [
            (name, family, c.hub or "shipped", c.revision if c.hub else "", c.note)
            for name, (family, c) in models.checkpoints().items()
        ]
        _say(tabulate(rows, ("model", "family", "checkpoint", "revision", "note")) + "\n")
    if args.methods or every:
        _say(tabulate(cards.rows(), headers="keys", maxcolwidths=[24, 14, 90]) + "\n")
    if args.benchmarks or every:
        loaded = [benchmarks.load(name) for name in benchmarks.names()]
        declared = [
            (b.name, b.group, b.kind or "", b.metrics[0].name if b.metrics else "", b.judge, b.title) for b in loaded
        ]
        _say(tabulate(declared, ("benchmark", "group", "kind", "metric", "judge", "title")))
    return 0


def _compare(args: argparse.Namespace) -> int:
    from ivcp_eval.reports.compare import compare

    comparison = compare(
        args.results,
        args.baseline,
        force=args.force,
        against=args.against,
        margin=args.margin,
        resamples=args.resamples,
    )
    _say(comparison.to_terminal())
    if args.output:
        comparison.write_csv(args.output)
        _say(f"\ncomparison: {args.output}")
    return 0


def _bench(arguments: list[str]) -> int:
    from ivcp_eval.lab.bench.pruning import main as bench

    return bench(arguments)


def _vlmeval(arguments: list[str]) -> int:
    from ivcp_eval.vlmeval_bridge import run_vlmeval

    return run_vlmeval(arguments)
