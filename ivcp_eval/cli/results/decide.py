"""Say of every variant whether it may be deployed: GO, NO-GO or UNDECIDED, by a margin that you state.

Exit code: 0 where some variant is GO, 1 where all are NO-GO, 3 where none is GO and some are undecided, 2 for a request
that cannot be carried out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.cli import say
from ivcp_eval.interface.registry import name_of
from ivcp_eval.runs.planning.numbers import INDEX, SHARE, Number

if TYPE_CHECKING:
    from ivcp_eval.reports.views.decision import Policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("results", type=Path, help="results CSV")
    add("baseline", type=Path, nargs="?", help="baseline CSV; default: rows of RESULTS itself")
    add_rule(parser, required=True)
    add("--method", help="show variants of this method only; all count in the correction")
    add("--ratio", type=SHARE, help="likewise, those that asked for this share")
    add_costs(parser)
    add("--force", action="store_true", help="decide although judge, prompts, pixels or versions differ")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON")
    shown.add_argument("--csv", action="store_true", help="print CSV")
    parser.epilog = "exit code: 0 some variant is GO; 1 all are NO-GO; 3 none is GO, some undecided; 2 not carried out"


def add_margin(to: Any, more: str = "") -> None:
    """The option that names a loss, on a parser or a group."""
    what = f"loss, in percent of the metric's scale, that is too much{more}"
    to.add_argument("--margin", type=Number(float, high=100, below=True), metavar="PERCENT", help=what)


def add_rule(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Options that state a rule."""
    add = parser.add_argument
    rule = parser.add_mutually_exclusive_group(required=required)
    add_margin(rule)
    rule.add_argument("--policy", type=Path, metavar="FILE", help="YAML with margin, alpha, critical and minimum_n; "
        "its hash stands in the output")  # fmt: skip
    add("--critical", nargs="+", metavar="NAME", help="benchmarks that decide (default: all)")
    add(
        "--alpha",
        type=Number(float, high=0.5, below=True),
        help="chance of a false GO for any variant of a model (default: 0.05)",
    )
    add("--minimum-n", type=INDEX, metavar="N", help="samples of a benchmark below which nothing is decided")


def add_costs(parser: argparse.ArgumentParser) -> None:
    """The option that names bench files."""
    add = parser.add_argument
    add("--cost", type=Path, nargs="+", default=[], metavar="BENCH", help="CSV files of `ivcp bench throughput --out`: "
        "what the variants cost (default: RESULTS with the suffix .cost.csv, if it is there)")  # fmt: skip


def policy_of(args: argparse.Namespace) -> Policy | None:
    """The rule that the options state; None where they state none.

    Raises:
        ValueError: options that would change what a file states, or that have no margin; or as `Policy`.
    """
    from ivcp_eval.reports.views.decision import Policy

    given = {"alpha": args.alpha, "critical": args.critical and tuple(args.critical), "minimum_n": args.minimum_n}
    given = {name: value for name, value in given.items() if value is not None}
    flags = ", ".join("--" + name.replace("_", "-") for name in given)
    if args.policy and given:
        raise ValueError(f"{flags} beside --policy: what was registered stands; say it in {args.policy}")
    if args.policy:
        return Policy.read(args.policy)
    if args.margin is None and given:
        raise ValueError(f"{flags} without a rule; state one with --margin or --policy")
    return None if args.margin is None else Policy(args.margin, **given)


def run(args: argparse.Namespace) -> int:
    """Print the verdicts; their exit code."""
    from ivcp_eval.reports.views.decision import decide

    policy = policy_of(args)
    assert policy is not None  # one of its options is required
    method = name_of(args.method) if args.method else None
    decision = decide(
        args.results, policy, args.baseline, force=args.force, method=method, ratio=args.ratio, bench=args.cost
    )
    if args.json:
        say(json.dumps(decision.to_json(), indent=2))
    elif args.csv:
        decision.write_csv(sys.stdout)
    else:
        say(decision.to_terminal())
    return decision.exit_code
