"""Score against retention ratio, with intervals, as CSV and plot."""

from __future__ import annotations

import argparse
from pathlib import Path

from ivcp_eval.cli import say
from ivcp_eval.runs.planning.numbers import COUNT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("results", type=Path, help="results CSV of a sweep, per-sample files beside it")
    parser.add_argument("--resamples", type=COUNT, default=10_000, help="bootstrap resamples (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace paired differences by unpaired ones too, where "
        "per-sample files are gone")  # fmt: skip
    parser.add_argument("--plot", nargs="+", default=[], metavar="METHOD", help="plot these only, the CSV has all")


def run(args: argparse.Namespace) -> int:
    """Write both beside the results."""
    from ivcp_eval.reports.views.curves import write

    say("wrote " + ", ".join(str(path) for path in write(args.results, args.resamples, args.plot, args.force)))
    return 0
