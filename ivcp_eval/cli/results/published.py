"""Show what papers published, alone or beside results of your own."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.cli import say
from ivcp_eval.runs.planning.numbers import AMOUNT, Number

if TYPE_CHECKING:
    from ivcp_eval.benchmarks.published import Published

MOST_ROWS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("--model", help="as printed, or a short name of `ivcp list`")
    add("--method", help="as printed, or a name of `ivcp list`")
    add("--benchmark", metavar="NAME", help="VLMEvalKit's name, or AVERAGE: the sources' own averages")
    add(
        "--kept",
        type=Number(float, high=100),
        metavar="PERCENT",
        help="share of visual tokens that stay, within --within",
    )
    add("--within", type=AMOUNT, default=1.5, metavar="POINTS", help="of --kept, and beside results (default: 1.5)")
    add("--beside", type=Path, metavar="RESULTS", help="results CSV: what was published beside each of its rows")
    add("--all", action="store_true", help=f"more than {MOST_ROWS} rows")


def run(args: argparse.Namespace) -> int:
    """Print a table; 1 if nothing was published."""
    from ivcp_eval.benchmarks.published import numbers

    matching = [n for n in numbers() if n.is_named(args.model, args.method, args.benchmark)]
    if args.kept is not None:
        matching = [
            n for n in matching if n.kept_percent is not None and abs(n.kept_percent - args.kept) <= args.within
        ]
    if not matching:
        say(f"nothing was published of that. {_known(numbers(), args)}")
        return 1
    if args.beside:
        return _beside(args, matching)
    if (args.model, args.method, args.benchmark, args.kept) == (None, None, None, None) and not args.all:
        say(f"{len(matching)} published numbers; name a model, a method or a benchmark. {_known(matching, args)}")
        return 0
    shown = matching if args.all else matching[:MOST_ROWS]
    say(_table(shown))
    if len(matching) > len(shown):
        say(f"... and {len(matching) - len(shown)} more: narrow it, or --all")
    say(_footer(shown))
    return 0


def _known(some: Sequence[Published], args: argparse.Namespace) -> str:
    """What there is, by each name that was not found or not given."""
    parts = []
    for name in ("model", "method", "benchmark"):
        value = getattr(args, name)
        if value and any(n.is_named(**{**_ANY, name: value}) for n in some):
            continue
        counts = Counter(getattr(n, "printed_method" if name == "method" else name) for n in some)
        parts.append(f"{name}s: " + ", ".join(f"{key} ({count})" for key, count in counts.most_common(60)))
    return "There are " + "; ".join(parts) + "." if parts else ""


_ANY: Mapping[str, Any] = {"model": None, "method": None, "benchmark": None}


def _table(rows: Sequence[Published]) -> str:
    from ivcp_eval.reports.terminal import fold

    columns = {
        "model": [n.model for n in rows],
        "method": [n.printed_method for n in rows],
        "benchmark": [n.benchmark for n in rows],
        "kept %": [_number(n.kept_percent) for n in rows],
        "by": [n.kept_means for n in rows],
        "score": [_number(n.score) for n in rows],
        "unpruned": [_number(n.unpruned) for n in rows],
        "retained %": ["" if n.retained is None else f"{n.retained:.1f}" for n in rows],
        "whose": [n.origin for n in rows],
        "source": [n.source for n in rows],
        "metric, note": ["; ".join(filter(None, (n.metric, n.note))) for n in rows],
    }
    return fold(columns, ("model", "method", "benchmark"), "metric, note")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _footer(rows: Sequence[Published]) -> str:
    from ivcp_eval.benchmarks.published import KEPT_MEANS, sources

    known = sources()
    lines = ["", "Copied from these, not measured here; compare within one source (results/baselines/field/README.md):"]
    lines += [f"  {name}: {known[name]}" for name in dict.fromkeys(n.source for n in rows)]
    lines += ["Kept by:"] + [f"  {key}: {KEPT_MEANS[key]}" for key in dict.fromkeys(n.kept_means for n in rows)]
    return "\n".join(lines)


def _beside(args: argparse.Namespace, published: Sequence[Published]) -> int:
    """Own rows whose benchmark's headline metric was compared, each with the range of what was published."""
    from ivcp_eval.benchmarks.published import range_beside
    from ivcp_eval.interface.variants import BASELINE
    from ivcp_eval.reports.compare import compare
    from ivcp_eval.reports.provenance import AGAIN, NotComparable, finished_headline, variant_key
    from ivcp_eval.reports.table import read_results
    from ivcp_eval.reports.terminal import FLOOR, floor_text, fold

    rows = [row for row in read_results(args.beside) if finished_headline(row)]
    compared = {}
    with suppress(NotComparable):  # no unpruned row: nothing is retained of anything
        found = compare(args.beside, resamples=100, select=finished_headline).rows
        compared = {variant_key(row): row for row in found}
    cells: dict[str, list[str]] = {
        name: []
        for name in (
            *("model", "method", "benchmark", "kept %", "score", "A/A", "retained %", "published %", "numbers", "from"),
        )
    }
    for row in rows:
        if row["method"] in (BASELINE, AGAIN) or row["ratio_kept_final"] is None:
            continue
        chosen = {"model": args.model, "method": args.method, "benchmark": args.benchmark}
        if any(value and value.casefold() != row[name].casefold() for name, value in chosen.items()):
            continue
        kept, own = 100 * row["ratio_kept_final"], compared.get(variant_key(row))
        beside = range_beside(published, row["model"], row["method"], row["benchmark"], kept, args.within)
        values = (
            *(row["model"], row["method"], row["benchmark"], f"{kept:.1f}", f"{row['score']:.1f}"),
            floor_text(own.noise_floor, 1) if own else "",
            f"{100 * row['score'] / own.score_baseline:.1f}" if own and own.score_baseline else "",
            f"{beside.lowest:.1f} to {beside.highest:.1f}" if beside else "nothing",
            *((str(beside.numbers), ", ".join(beside.sources)) if beside else ("", "")),
        )
        for column, value in zip(cells.values(), values, strict=True):
            column.append(value)
    if not cells["model"]:
        say(f"{args.beside} has no pruned row with a measured share of kept tokens")
        return 1
    measured = any(cells["A/A"])
    if not measured:
        del cells["A/A"]
    say(fold(cells, ("model", "method", "benchmark"), "from"))
    say(
        "\nKept: visual tokens after the last cut. Of methods that cut inside the language model, papers mostly print "
        "the mean over the layers: see `ivcp published --method NAME`, and hold that equal (BUDGET=layer_mean)."
        + (f"\n{FLOOR}" if measured else "")
    )
    return 0
