"""Controlled comparisons: what coordinate tokens do, and whether pruning flips more answers than a paraphrase."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivcp_eval.benchmarks import is_file_name
from ivcp_eval.cli import add_common, notices, say
from ivcp_eval.runs.planning.numbers import COUNT, INDEX, SHARE
from ivcp_eval.runs.planning.options import add_flags, given_flags

FLAGS = (
    *("limit", "device", "dtype", "attention", "min_pixels", "max_pixels", "max_new_tokens", "nframe", "fps"),
    *("timeout", "trust_remote_code"),
)
READING = (
    "Differences are in points, with 95 % intervals over pictures; p_holm: permutation test over pictures (of flips, "
    "where every picture has one question, exact McNemar test), after Holm's correction over the table.\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of both analyses."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ANALYSIS")
    _add_coordinates(verbs)
    _add_flips(verbs)


def _add_coordinates(verbs: Any) -> None:
    text = "grounding with coordinate tokens, and as many random ones, kept or dropped inside and outside the target"
    verb = verbs.add_parser("coordinates", help=text, description=text)
    add_study(verb)
    add_common(verb)
    add = verb.add_argument
    add("--data", default="tiny_grounding", metavar="NAME", help="a grounding benchmark, or a file of "
        "your own pictures (default: %(default)s)")  # fmt: skip
    add("--methods", nargs="+", default=["ivc_prune", "random", "fastv"], metavar="NAME", help="methods to show beside "
        "the selections made by hand, at ratio 0.5 (default: %(default)s)")  # fmt: skip
    add("--layer", type=INDEX, help="where tokens are dropped by hand (default: where the first of --methods cuts)")
    add("--seed", type=INDEX, default=0, help="of what is drawn (default: %(default)s)")


def _add_flips(verbs: Any) -> None:
    text = "answers that pruning flips, beside those that a paraphrase and a picture one patch larger flip"
    verb = verbs.add_parser("flips", help=text, description=text)
    add = verb.add_argument
    add("results", type=Path, nargs="?", help="results CSV whose answers are taken; only the controls are answered "
        "then. Without: --model, --method, --ratio")  # fmt: skip
    add_study(verb)
    add_common(verb)
    add("--data", nargs="+", default=["tiny_short"], metavar="NAME", help="benchmarks, or files of your own "
        "pictures, without RESULTS (default: %(default)s)")  # fmt: skip
    add("--method", nargs="+", default=["ivc_prune"], metavar="NAME", help="pruning methods (default: %(default)s)")
    add("--ratio", type=SHARE, nargs="+", default=[0.5], help="shares of the visual tokens (default: %(default)s)")
    add("--seed", type=INDEX, default=0, help="of methods that draw (default: %(default)s)")
    add("--paraphrases", type=Path, metavar="FILE", help="CSV or TSV with index and question, the question in other "
        "words; default: fixed templates that wrap the question")  # fmt: skip
    add("--pixels", type=COUNT, metavar="N", help="by which width and height grow (default: one patch of the model)")
    add("--count", choices=("verdict", "answer"), default="verdict", help="what a flip is: right to wrong or back, or "
        "any other text (default: %(default)s)")  # fmt: skip


def add_study(parser: argparse.ArgumentParser) -> None:
    """Options of whatever runs one model on one benchmark."""
    parser.add_argument("--model", default="tiny", help="short name, see `ivcp list` (default: %(default)s)")
    parser.add_argument("--model-path", help="local folder with the checkpoint")
    parser.add_argument("--output", type=Path, help="CSV to write, and beside it .json with what it was made from "
        "(default: below results/analyses)")  # fmt: skip
    parser.add_argument("--work", type=Path, help="where answers are kept, so that the same command goes on after an "
        "interruption (default: results/analyses)")  # fmt: skip
    add_flags(parser, FLAGS)


def run(args: argparse.Namespace) -> int:
    """Run one of them; 0."""
    return {"coordinates": _coordinates, "flips": _flips}[args.verb](args)


def _coordinates(args: argparse.Namespace) -> int:
    from ivcp_eval.runs.analysis import coordinates
    from ivcp_eval.runs.analysis.study import Study, text

    (args.data,) = prepared(args, [args.data])
    methods = [{"method": name, "ratios": [coordinates.RATIO], "seeds": [args.seed]} for name in args.methods]
    study = Study.of(request(args, args.data, methods), folder(args), notices(args))
    rows, settings = coordinates.measure(study, args.layer, args.seed, bar=bar(args))
    shown = text(rows, ("n", "clusters", "failed"))
    shown += f"\n\n{rows[0]['n']} questions about {rows[0]['clusters']} pictures."
    finish(args, f"coordinates/{args.model}-{args.data}", rows, study.provenance(settings), shown)
    return 0


def _flips(args: argparse.Namespace) -> int:
    from ivcp_eval.runs.analysis import flips
    from ivcp_eval.runs.analysis.study import NO_METHODS, Study, text, with_holm

    args.data = prepared(args, args.data)
    stored = flips.Stored.of(args.results) if args.results else [None] * len(args.data)
    methods = [{"method": name, "ratios": args.ratio, "seeds": [args.seed]} for name in args.method]
    rows: list[dict[str, Any]] = []
    provenance: list[dict[str, Any]] = []
    session = None
    for number, one in enumerate(stored):
        if one is None:
            raw = request(args, args.data[number], methods)
        else:
            limit = {} if one.baseline["limit"] is None else {"limit": one.baseline["limit"]}
            raw = {**request(args, one.baseline["benchmark"], NO_METHODS), **limit}
            raw["models"] = {one.baseline["model"]: args.model_path}
        study = Study.of(raw, folder(args), notices(args))
        if session is not None and session.weights == study.model.weights:
            study.session = session
        table, settings = flips.measure(
            study, one, file=args.paraphrases, pixels=args.pixels, count=args.count, bar=bar(args)
        )
        session = study.session
        rows += [{"benchmark": study.benchmark.name, **row} for row in table]
        provenance.append(study.provenance(settings))
    name = args.results.stem if args.results else f"{args.model}-{'-'.join(args.data)}"
    with_holm(rows)
    counts = list({(row["benchmark"], row["change"]): row for row in rows}.values())
    tests = [row for row in rows if row["against"]]
    counted = ("answers_changed", "verdicts_changed", "right_to_wrong", "wrong_to_right", "score")
    tested = ("against", "difference", "test", "p_holm")
    say(f"{text(counts, tested, 2)}\n\nShare of samples with another {args.count}, pruning minus control:\n")
    finish(args, f"flips/{name}", rows, {"benchmarks": provenance}, text(tests, (*counted, "n", "clusters"), 2))
    return 0


def prepared(args: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """Benchmarks by name; of files of a user's own pictures benchmarks are made."""
    if not any(map(is_file_name, words)):
        return list(words)
    from ivcp_eval.vlmeval_bridge.reading.own import names_of

    return names_of(words, notices(args))


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
    shown: str,
    reading: str = READING,
) -> Path:
    """Print what is shown of the table, and write it; returns the CSV."""
    from ivcp_eval.runs.analysis.study import FOLDER, write

    say(f"{shown}\n\n{reading}")
    path: Path = args.output or FOLDER / f"{name}.csv"
    write(path, rows, provenance)
    say(f"table: {path}; what it was made from: {path.with_suffix('.json')}")
    return path
