"""``ivcp method new NAME`` and ``ivcp method check NAME``."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("action", choices=("new", "check"), help="write a template with its test, or run the contract")
    parser.add_argument("name", help="the method's name, which is its file name")
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help="check only on these (default: all)")


def run(args: argparse.Namespace) -> int:
    """0 done, 1 the contract is broken."""
    from ivcp_eval.interface.scaffold import check_method, new_method

    if args.action == "new":
        method, test = new_method(args.name)
        _say(
            f"wrote {method}\nwrote {test}\n"
            f"next: fill in `cuts` and `score`, and the oracle; pytest {test}; ivcp method check {args.name}\n"
            "before merging: fill in the docstring; git add both; ivcp docs (README's table)"
        )
        return 0
    report = check_method(args.name, args.families, lambda family: _say(f"... {family}"))
    _say(report.to_text())
    return 1 if report.failures else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
