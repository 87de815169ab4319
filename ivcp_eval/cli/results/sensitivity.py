"""How much each parameter of a method matters, as a page."""

from __future__ import annotations

import argparse
from pathlib import Path

from ivcp_eval.cli import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("results", type=Path, help="results CSV of a sweep, per-sample files beside it")
    parser.add_argument("page", type=Path, help="Markdown file to write")


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from ivcp_eval.reports.views.sensitivity import write

    write(args.results, args.page)
    say(f"wrote {args.page}")
    return 0
