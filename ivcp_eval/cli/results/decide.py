"""Say of every variant whether it may be deployed: GO, NO-GO or UNDECIDED, by a margin that you state.

Exit code: 0 where some variant is GO, 1 where all are NO-GO, 3 where none is GO and some are undecided, 2 for a request
that cannot be carried out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ivcp_eval.cli import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("results", type=Path, help="results CSV")
    add("baseline", type=Path, nargs="?", help="baseline CSV; default: rows of RESULTS itself")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--margin", type=float, help="loss, in percent of the scale, that is too much")
    rule.add_argument("--policy", type=Path, metavar="FILE", help="YAML with margin, alpha, critical and minimum_n; "
        "its hash stands in the output")  # fmt: skip
    add("--critical", nargs="+", metavar="NAME", help="benchmarks that decide (default: all)")
    add("--alpha", type=float, help="chance of a false GO for any variant of a model (default: 0.05)")
    add("--minimum-n", type=int, metavar="N", help="samples of a benchmark below which nothing is decided")
    add("--method", help="only variants of this method")
    add("--ratio", type=float, help="only variants that asked for this share")
    add("--force", action="store_true", help="decide although judge, prompts, pixels or versions differ")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON")
    shown.add_argument("--csv", action="store_true", help="print CSV")
    parser.epilog = "exit code: 0 some variant is GO; 1 all are NO-GO; 3 none is GO, some undecided; 2 not carried out"


def run(args: argparse.Namespace) -> int:
    """Print the verdicts; their exit code."""
    from ivcp_eval.reports.provenance import Selection
    from ivcp_eval.reports.views.decision import Policy, decide

    given = {"alpha": args.alpha, "critical": args.critical and tuple(args.critical), "minimum_n": args.minimum_n}
    given = {name: value for name, value in given.items() if value is not None}
    if args.policy and given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{flags} beside --policy: what was registered stands; say it in {args.policy}")
    policy = Policy.read(args.policy) if args.policy else Policy(args.margin, **given)
    chosen = Selection(args.method, args.ratio)
    decision = decide(args.results, policy, args.baseline, force=args.force, select=chosen.fits)
    if args.json:
        say(json.dumps(decision.to_json(), indent=2))
    elif args.csv:
        decision.write_csv(sys.stdout)
    else:
        say(decision.to_terminal())
    return decision.exit_code
