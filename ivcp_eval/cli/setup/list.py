"""Show the models, methods and benchmarks that run here by name; with --models and the like, or --all, in detail."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from ivcp_eval.cli import notices, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    for what in ("models", "methods", "benchmarks"):
        parser.add_argument(f"--{what}", action="store_true", help=f"the {what} alone, each with a note")
    parser.add_argument(
        "--all", action="store_true", help="also every checkpoint of a family, methods that do not run here and why, "
        "and benchmarks whose data is not here, each with a note"
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the tables."""
    from ivcp_eval.reports.terminal import fold, wrapped

    tables = {
        "models": (_models, "note", "checkpoints of these families"),
        "methods": (_methods, "note", "published methods, which do not run here"),
        "benchmarks": (_benchmarks, "title", "benchmarks, whose data is not here yet"),
    }
    chosen = [what for what in tables if getattr(args, what)]
    for what in chosen or tables:
        entries, prose, rest = tables[what]
        rows = entries()
        shown = [row for row, first in rows if first or args.all]
        if chosen or args.all:
            heads = list(rows[0][0])
            say(fold({head: [row[head] for row in shown] for head in heads}, heads[:1], prose) + "\n")
        else:
            say(f"{_names(what, shown)}\n")
        if len(shown) < len(rows):
            notices(args)(wrapped(f"... and {len(rows) - len(shown)} more {rest} (`ivcp list --{what} --all`)") + "\n")
    if not (chosen or args.all):
        notices(args)(wrapped("`ivcp list --models`, --methods and --benchmarks say more of each."))
    return 0


#: One row of a table, whose first column is its name, and whether it runs here as it is.
_Entry = tuple[Mapping[str, str], bool]


def _names(what: str, rows: Sequence[Mapping[str, str]]) -> str:
    """The names alone, a paragraph for each group."""
    from ivcp_eval.reports.terminal import wrapped

    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(_group(what, row), []).append(next(iter(row.values())).split(" (")[0])
    paragraphs = [f"{group}: {', '.join(names)}" for group, names in groups.items()]
    return "\n".join([f"{what}:", *(wrapped(text, indent="  ", hanging="  ") for text in paragraphs)])


def _group(what: str, row: Mapping[str, str]) -> str:
    if what == "methods":
        from ivcp_eval.methods._cards import LABELS

        return f"{row['use']} ({LABELS[row['use']]})" if row["use"] in LABELS else row["use"]
    if what == "models":
        return "shipped" if row["checkpoint"] == "shipped" else row["family"]
    return row["kind"] or "other"


def _models() -> Sequence[_Entry]:
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


def _benchmarks() -> Sequence[_Entry]:
    """Those whose data is here."""
    from ivcp_eval import benchmarks
    from ivcp_eval.runs.planning.data import path_of

    entries: list[_Entry] = []
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
