"""Compare a results CSV with a baseline CSV."""

from __future__ import annotations

import argparse
from pathlib import Path

from ivcp_eval import benchmarks
from ivcp_eval.cli import say
from ivcp_eval.cli.results.decide import add_costs, add_margin
from ivcp_eval.files import results_file
from ivcp_eval.interface.registry import name_of
from ivcp_eval.interface.variants import parameter
from ivcp_eval.runs.planning.numbers import COUNT, INDEX, SHARE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("results", type=results_file, help="results CSV")
    add("baseline", type=results_file, nargs="?", help="baseline CSV; default: rows of RESULTS itself")
    add("--method", help="only rows of this method")
    add("--ratio", type=SHARE, help="only rows that asked for this share")
    add("--budget", metavar="KIND", help="only rows that hold this budget: own, final, layer_mean or flops")
    add("--set", nargs="*", metavar="KEY=VALUE", help="only rows with these parameters of the method, the others as "
        "usual; without any: as usual")  # fmt: skip
    add("--data", nargs="+", metavar="NAME", help="only rows of these benchmarks, groups, or files of your own")
    add("--limit", type=INDEX, metavar="N", help="only rows of runs with this --limit; 0: of runs without")
    add("--seed", type=INDEX, help="only rows of this seed")
    for name in ("dtype", "attention", "device"):
        add(f"--{name}", help=f"only rows that were computed so, by the column {name}")
    add("--force", action="store_true", help="compare although judge, prompts, pixels or versions differ")
    add("--against", default="none", metavar="WHAT", help="which rows of BASELINE count: none (unpruned), full "
        "(unpruned, for models with quantised weights), same_method, the name of a method, e.g. random, at the same "
        "ratio or budget, or METHOD:RATIO, one variant for all rows, which are then ranked "
        "(default: %(default)s)")  # fmt: skip
    add_margin(parser, "; adds a verdict per row, uncorrected (`ivcp decide` corrects)")
    add("--resamples", type=COUNT, default=10_000, help="bootstrap resamples of a row (default: %(default)s)")
    add_costs(parser)
    add("--output", type=Path, help="also write the comparison as CSV")


def run(args: argparse.Namespace) -> int:
    """Print the comparison."""
    from ivcp_eval.reports.compare import compare
    from ivcp_eval.reports.provenance import CHOSEN, Selection
    from ivcp_eval.reports.table import read_results
    from ivcp_eval.reports.views.costs import join

    names = [Path(word).stem if benchmarks.is_file_name(word) else word for word in args.data or ()]
    chosen = Selection(
        method=name_of(args.method) if args.method else None,
        ratio=args.ratio,
        budget=args.budget,
        parameters=None if args.set is None else dict(parameter(text) for text in args.set),
        limit=args.limit,
        benchmarks=benchmarks.expand(names) if names else None,
        **{name: getattr(args, name) for name in CHOSEN},
    )
    comparison = compare(
        args.results,
        args.baseline,
        force=args.force,
        against=args.against,
        margin=args.margin,
        resamples=args.resamples,
        select=chosen.fits,
    )
    costs = join(comparison.rows, args.results, read_results(args.results), args.cost)
    say(comparison.to_terminal())
    if costs is not None:
        say(f"\n{costs.to_terminal()}")
    if args.output:
        comparison.write_csv(args.output)
        say(f"\ncomparison: {args.output}")
    return 0
