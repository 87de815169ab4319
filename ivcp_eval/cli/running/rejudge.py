"""Score stored predictions with another judge, without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from ivcp_eval.cli import notices, say
from ivcp_eval.runs.planning.numbers import AMOUNT, COUNT
from ivcp_eval.runs.planning.options import add_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("results", type=Path, help="results CSV of `ivcp eval` or a sweep")
    add("--judge", default="gpt-4o", help="judge model, or exact_matching (default: %(default)s)")
    add("--judge-url", default="", help="its OpenAI-compatible endpoint (default: $OPENAI_BASE_URL, else OpenAI's)")
    add_flags(parser, ("judge_options",))
    add("--concurrency", type=COUNT, default=8, help="requests at once (default: %(default)s)")
    add("--data", nargs="+", default=[], metavar="NAME", help="only these benchmarks; default: all that are judged")
    add("--output", type=Path, help="new results CSV (default: RESULTS.rejudged-JUDGE.csv)")
    add("--cache", type=Path, help="folder of the verdicts (default: results/cache/judge)")
    add("--estimate", action="store_true", help="only say how many calls and tokens it takes and what they cost")
    add("--price", nargs=2, type=AMOUNT, metavar=("IN", "OUT"), help="dollars per million tokens, for --estimate")


def run(args: argparse.Namespace) -> int:
    """Carry it out; 0 done, 1 some cells have no score."""
    from ivcp_eval.runs.planning import cells
    from ivcp_eval.runs.records.rejudge import estimate_rejudge, rejudge
    from ivcp_eval.vlmeval_bridge.judge import EXACT_MATCHING, JudgeConfig, cache_folder

    cache = args.cache or cache_folder(cells.RUNS)
    config = None
    if args.judge != EXACT_MATCHING:
        config = JudgeConfig(args.judge, args.judge_url, args.concurrency, extra=args.judge_options or {})
    if args.estimate:
        if config is None:
            say("exact matching asks nobody")
            return 0
        price = tuple(args.price) if args.price else None
        say(f"{config.identity}: {estimate_rejudge(args.results, config, cache, args.data, price)}")
        return 0
    outcome = rejudge(args.results, config, cache, args.output, args.data, notices(args))
    for problem in outcome.problems:
        say(f"NOT WHOLE: {problem}")
    say(f"{outcome.rated} cells rated, {outcome.kept} rows taken over\n\nresults: {outcome.csv}")
    return 1 if outcome.problems else 0
