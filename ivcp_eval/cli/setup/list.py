"""Show the models, methods and benchmarks to begin with; with --all every one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ivcp_eval.cli import notices, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    for what in ("models", "methods", "benchmarks"):
        parser.add_argument(f"--{what}", action="store_true", help=f"only the {what}")
    parser.add_argument(
        "--all", action="store_true", help="every checkpoint of a family, methods that do not run here and why, and "
        "benchmarks whose data is not here"
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    every = not (args.models or args.methods or args.benchmarks)
    tell = notices(args)
    if args.models or every:
        _show(_models(), "model", "note", "models: further checkpoints of these families", args.all, tell)
    if args.methods or every:
        _show(_methods(), "method or system", "note", "methods: published, and not run here", args.all, tell)
    if args.benchmarks or every:
        _show(_benchmarks(), "benchmark", "title", "benchmarks: the data is not here yet", args.all, tell)
    return 0


#: One row of a table, and whether it is among those to begin with.
_Entry = tuple[Mapping[str, str], bool]


def _show(
    entries: Iterable[_Entry], name: str, prose: str, rest: str, whole: bool, tell: Callable[[str], None]
) -> None:
    from ivcp_eval.reports.terminal import fold

    entries = list(entries)
    shown = [row for row, first in entries if first or whole]
    say(fold({head: [row[head] for row in shown] for head in entries[0][0]}, [name], prose) + "\n")
    if len(shown) < len(entries):
        tell(f"... and {len(entries) - len(shown)} more {rest} (`ivcp list --all`)\n")


def _models() -> list[_Entry]:
    """The shipped ones, and the first checkpoint of each family."""
    from ivcp_eval.interface import models

    entries: list[_Entry] = []
    families = set()
    for name, (family, checkpoint) in models.checkpoints().items():
        row = {
            "model": name,
            "family": family,
            "checkpoint": checkpoint.hub or "shipped",
            "revision": checkpoint.revision if checkpoint.hub else "",
            "note": checkpoint.note,
        }
        first = not checkpoint.local and family not in families
        families |= {family} if first else set()
        entries.append((row, first or bool(checkpoint.local)))
    return sorted(entries, key=lambda entry: entry[0]["checkpoint"] != "shipped")


def _methods() -> Sequence[_Entry]:
    """Those that run, plug-ins among them, and the systems that a verb covers."""
    from ivcp_eval.methods import _cards as cards

    return [(row, row["use"] == "tool" or row["use"] not in cards.STATES) for row in cards.rows()]


def _benchmarks() -> list[_Entry]:
    """Those whose data is here."""
    from ivcp_eval import benchmarks
    from ivcp_eval.runs.planning.data import path_of

    entries: list[tuple[dict[str, Any], bool]] = []
    for benchmark in map(benchmarks.load, benchmarks.names()):
        row = {
            "benchmark": benchmark.name,
            "group": benchmark.group,
            "kind": benchmark.kind or "",
            "metric": benchmark.metrics[0].name if benchmark.metrics else "",
            "judge": benchmark.judge,
            "title": benchmark.title,
        }
        entries.append((row, path_of(benchmark).is_file()))
    return sorted(entries, key=lambda entry: not entry[1])
