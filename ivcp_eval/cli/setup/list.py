"""Show models, methods and benchmarks."""

from __future__ import annotations

import argparse

from ivcp_eval.cli import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    for what in ("models", "methods", "benchmarks"):
        parser.add_argument(f"--{what}", action="store_true", help=f"only the {what}")


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    from tabulate import tabulate

    from ivcp_eval import benchmarks
    from ivcp_eval.interface import models
    from ivcp_eval.methods import _cards as cards

    every = not (args.models or args.methods or args.benchmarks)
    if args.models or every:
        rows = [
            (name, family, c.hub or "shipped", c.revision if c.hub else "", c.note)
            for name, (family, c) in models.checkpoints().items()
        ]
        say(tabulate(rows, ("model", "family", "checkpoint", "revision", "note")) + "\n")
    if args.methods or every:
        say(tabulate(cards.rows(), headers="keys", maxcolwidths=[24, 14, 90]) + "\n")
    if args.benchmarks or every:
        loaded = [benchmarks.load(name) for name in benchmarks.names()]
        declared = [
            (b.name, b.group, b.kind or "", b.metrics[0].name if b.metrics else "", b.judge, b.title) for b in loaded
        ]
        say(tabulate(declared, ("benchmark", "group", "kind", "metric", "judge", "title")))
    return 0
