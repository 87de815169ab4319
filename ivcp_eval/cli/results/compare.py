"""Compare a results CSV with a baseline CSV."""

from __future__ import annotations

import argparse
from pathlib import Path

from ivcp_eval.cli import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("results", type=Path, help="results CSV")
    add("baseline", type=Path, nargs="?", help="baseline CSV; default: the unpruned rows of RESULTS")
    add("--force", action="store_true", help="compare although judge, prompts, pixels or versions differ")
    add("--against", choices=("none", "same_method"), default="none", help="which rows of BASELINE count")
    add("--margin", type=float, help="points that may be lost; adds a verdict per row")
    add("--resamples", type=int, default=10_000, help="bootstrap resamples of a row (default: %(default)s)")
    add("--output", type=Path, help="also write the comparison as CSV")


def run(args: argparse.Namespace) -> int:
    """Print the comparison."""
    from ivcp_eval.reports.compare import compare

    comparison = compare(
        args.results,
        args.baseline,
        force=args.force,
        against=args.against,
        margin=args.margin,
        resamples=args.resamples,
    )
    say(comparison.to_terminal())
    if args.output:
        comparison.write_csv(args.output)
        say(f"\ncomparison: {args.output}")
    return 0
