"""Write a report as one static HTML file: verdict, plots, flips, pictures of what was kept, costs, provenance.

The file needs no network and no other file. With --margin or --policy it says of every variant whether it may be
deployed, by the rule of `ivcp decide`.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ivcp_eval.cli import say
from ivcp_eval.cli.results.decide import add_costs, add_rule, policy_of
from ivcp_eval.files import results_file
from ivcp_eval.runs.planning.numbers import COUNT, INDEX


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("results", type=results_file, help="results CSV, per-sample files beside it")
    add("baseline", type=results_file, nargs="?", help="baseline CSV; default: rows of RESULTS itself")
    add("--out", type=Path, metavar="FILE", help="HTML file (default: RESULTS with the suffix .html)")
    add("--figures", type=Path, metavar="DIR", help="also write every plot there, as SVG and PNG")
    add_rule(parser, required=False)
    add("--cards", type=INDEX, default=200, metavar="N", help="most samples that are shown one by one, up to 200, of "
        "which a third with pictures (default: %(default)s)")  # fmt: skip
    add_costs(parser)
    add("--force", action="store_true", help="compare although judge, prompts, pixels or versions differ")
    add("--resamples", type=COUNT, default=10_000, help="bootstrap resamples of a row (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the files and say where they are."""
    from ivcp_eval.reports.html import render

    render.check_installed()  # before anything is computed
    from ivcp_eval.reports.html.collect import collect

    out = args.out or args.results.with_suffix(".html")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{out}: the name of a report ends in .html")
    report = collect(
        args.results,
        policy_of(args),
        args.baseline,
        force=args.force,
        resamples=args.resamples,
        cards=args.cards,
        command=_command(args),
        bench=args.cost,
    )
    render.write(report, out)
    say(f"report: {out}")
    if args.figures:
        files = render.figures(report, args.figures)
        say(f"{len(files)} figures: {args.figures}")
    return 0


def _command(args: argparse.Namespace) -> str:
    """That makes the same report again."""
    words = ["ivcp", "report", args.results.as_posix(), *([args.baseline.as_posix()] if args.baseline else [])]
    for name in ("margin", "policy", "critical", "alpha", "minimum_n", "cards", "cost", "resamples"):
        value = getattr(args, name)
        if value not in (None, []):
            listed = value if isinstance(value, list) else [value]
            words += ["--" + name.replace("_", "-"), *map(str, listed)]
    return shlex.join([*words, *(["--force"] if args.force else [])])
