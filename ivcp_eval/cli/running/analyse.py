"""Controlled comparisons: what coordinate tokens do, and whether pruning flips more answers than a paraphrase."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivcp_eval.cli import add_common, notices, say
from ivcp_eval.runs.planning.options import add_flags, given_flags

FLAGS = (
    *("limit", "device", "dtype", "attention", "min_pixels", "max_pixels", "max_new_tokens", "timeout"),
    "trust_remote_code",
)
READING = (
    "Differences are in points, with 95 % intervals over pictures; p_holm is that of a permutation test after Holm's "
    "correction over the table."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both analyses."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ANALYSIS")
    _add_coordinates(verbs)


def _add_coordinates(verbs: Any) -> None:
    text = "grounding with coordinate tokens, and as many random ones, kept or dropped inside and outside the target"
    verb = verbs.add_parser("coordinates", help=text, description=text)
    add_study(verb)
    add = verb.add_argument
    add("--data", default="tiny_grounding", metavar="NAME", help="a grounding benchmark (default: %(default)s)")
    add("--methods", nargs="+", default=["ivc_prune", "random", "fastv"], metavar="NAME", help="methods to show beside "
        "the selections made by hand, at ratio 0.5 (default: %(default)s)")  # fmt: skip
    add("--layer", type=int, help="where tokens are dropped by hand (default: where the first of --methods cuts)")
    add("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")


def add_study(parser: argparse.ArgumentParser) -> None:
    """Options of whatever runs one model on one benchmark."""
    parser.add_argument("--model", default="tiny", help="short name, see `ivcp list` (default: %(default)s)")
    parser.add_argument("--model-path", help="local folder with the checkpoint")
    parser.add_argument("--output", type=Path, help="CSV to write, and beside it .json with what it was made from "
        "(default: below results/analyses)")  # fmt: skip
    parser.add_argument("--work", type=Path, help="where answers are kept, so that the same command goes on after an "
        "interruption (default: results/analyses)")  # fmt: skip
    add_flags(parser, FLAGS)
    add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Run one of them; 0."""
    return _coordinates(args)


def _coordinates(args: argparse.Namespace) -> int:
    from ivcp_eval.runs.analysis import coordinates
    from ivcp_eval.runs.analysis.study import Study

    methods = [{"method": name, "ratios": [coordinates.RATIO], "seeds": [args.seed]} for name in args.methods]
    study = Study.of(request(args, args.data, methods), folder(args), notices(args))
    rows, settings = coordinates.measure(study, args.layer, args.seed, bar=bar(args))
    hidden = ("n", "clusters", "failed")
    finish(args, f"coordinates/{args.model}-{args.data}", rows, study.provenance(settings), hidden)
    say(f"{rows[0]['n']} questions about {rows[0]['clusters']} pictures. {READING}")
    return 0


def request(args: argparse.Namespace, benchmark: str, methods: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As a sweep file would say it."""
    return {
        "models": {args.model: args.model_path},
        "benchmarks": [benchmark],
        "methods": list(methods),
        **given_flags(args, FLAGS),
    }


def folder(args: argparse.Namespace) -> Path:
    """Where answers are kept."""
    from ivcp_eval.runs.analysis.study import FOLDER

    work: Path = args.work or FOLDER
    return work


def bar(args: argparse.Namespace) -> Any:
    """Shows the progress over a list, on a terminal."""
    from tqdm import tqdm

    return lambda items: tqdm(items, disable=args.quiet)


def finish(
    args: argparse.Namespace,
    name: str,
    rows: Sequence[dict[str, Any]],
    provenance: dict[str, Any],
    hidden: Sequence[str] = (),
) -> Path:
    """Print the table and write it; returns the CSV."""
    from ivcp_eval.runs.analysis.study import FOLDER, text, write

    say(text(rows, hidden))
    path: Path = args.output or FOLDER / f"{name}.csv"
    write(path, rows, provenance)
    say(f"\ntable: {path}; what it was made from: {path.with_suffix('.json')}")
    return path
