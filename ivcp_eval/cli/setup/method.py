"""Write a new method's template with its test, or run the contract on a method."""

from __future__ import annotations

import argparse

from ivcp_eval.cli import notices, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("action", choices=("new", "check"), help="write a template with its test, or run the contract")
    parser.add_argument("name", help="the method's name, which is its file name")
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help="check only on these (default: all)")


def run(args: argparse.Namespace) -> int:
    """0 done, 1 the contract is broken."""
    from ivcp_eval.lab.scaffold import check_method, new_method

    if args.action == "new":
        method, test = new_method(args.name)
        say(f"wrote {method}\nwrote {test}")
        notices(args)(
            f"next: fill in `cuts` and `score`, and the oracle; pytest {test}; ivcp method check {args.name}\n"
            "before merging: fill in the docstring; git add both; ivcp docs (README's table)"
        )
        return 0
    report = check_method(args.name, args.families, lambda family: notices(args)(f"... {family}"))
    say(report.to_text())
    return 1 if report.failures else 0
