"""Run a model unpruned and pruned, and compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from ivcp_eval.cli import parameter, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
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


def run(args: argparse.Namespace) -> int:
    """0 done, 1 some cells are not whole."""
    from ivcp_eval.engine import check_ratio
    from ivcp_eval.interface.failures import check_timeout
    from ivcp_eval.interface.registry import make_method
    from ivcp_eval.interface.variants import Budget, Variant
    from ivcp_eval.runs.planning import cells
    from ivcp_eval.runs.planning.request import Request
    from ivcp_eval.runs.runner import evaluate

    check_ratio(args.ratio)
    check_timeout(args.timeout)
    if args.estimate:
        return _estimate(args)
    parameters = dict(parameter(text) for text in args.set)
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
    outcome = evaluate(request, say)
    for problem in outcome.problems:
        say(f"NOT WHOLE: {problem}")
    if outcome.problems:
        say("run the same command again to retry what failed; finished cells are reused")
    from ivcp_eval.reports.compare import compare

    try:
        say(f"\n{compare(outcome.csv).to_terminal()}")
    except ValueError as error:
        # Where every cell has a problem (said above), or only the baseline was asked for, there is no table.
        say(f"\nno comparison: {error}")
    say(f"\nresults: {outcome.csv}")
    return 1 if outcome.problems else 0


def _estimate(args: argparse.Namespace) -> int:
    from ivcp_eval.cli.setup import data
    from ivcp_eval.interface import models
    from ivcp_eval.runs.planning import cells
    from ivcp_eval.runs.records.rejudge import estimate_eval
    from ivcp_eval.vlmeval_bridge.judge import cache_folder

    _, checkpoint = models.find(args.model)
    names = [b.name for b in data.chosen(args.data or ["embedded" if checkpoint.local else "matrix"])]
    variants = 1 if args.method == "none" else 2
    options = {"max_new_tokens": args.max_new_tokens, "limit": args.limit}
    known = {name: value for name, value in options.items() if value is not None}
    cache = cache_folder(args.runs or cells.RUNS)
    say(f"judge, at most: {estimate_eval(names, args.judge, cache, variants, **known)}")
    return 0
