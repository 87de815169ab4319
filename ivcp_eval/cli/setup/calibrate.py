"""Compute what a method reads from a file, for one model: weights of heads (hawk) or sensitivity of layers (quota).

hawk: every head is silenced in turn and the accuracy lost on a calibration split is its weight. Interrupt it whenever
you like: the same command goes on. Then `ivcp eval --method hawk --set weights=FILE`.

quota: how much 4 bits distort what enters each layer, one pass over the questions. Then `ivcp eval --method quota --set
sensitivity=FILE`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ivcp_eval.cli import notices, say
from ivcp_eval.runs.planning.numbers import COUNT, INDEX


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    parser.add_argument("method", choices=("hawk", "quota"), help="whose file to write")
    parser.add_argument("model", nargs="?", default="tiny", help="short name (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: METHOD_MODEL.json)")
    parser.add_argument("--path", help="local folder with the checkpoint")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="TSV or JSONL with image or image_path, question and, if known, answer; each file is one set, and "
        "all sets weigh the same (default: generated scenes of the embedded model's validation split)",
    )
    parser.add_argument("--questions", type=COUNT, default=60, help="most of each set (default: %(default)s)")
    parser.add_argument(
        "--layers", type=INDEX, nargs="+", help="hawk: where a head is silenced, 0-based (default: every layer)"
    )
    parser.add_argument("--max-new-tokens", type=COUNT, default=32, help="of an answer (default: %(default)s)")
    for option in ("device", "dtype", "attention"):
        parser.add_argument(f"--{option}", default="", help="default: found")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow a checkpoint's own code to run")


def run(args: argparse.Namespace) -> int:
    """Measure and write; 0."""
    from ivcp_eval.interface import models
    from ivcp_eval.lab.calibration import heads, layers, questions
    from ivcp_eval.runs.answering.session import Session
    from ivcp_eval.runs.planning.placement import Limits, Placement

    if args.layers and args.method != "hawk":
        raise ValueError(f"--layers is for hawk; {args.method} measures every layer")
    tell = notices(args)
    weights = models.locate(args.model, args.path)
    sets = [questions.from_file(file, args.questions) for file in args.data or ()] or questions.generated(
        args.questions
    )
    for one in sets:
        tell(f"{one.name}: {questions.kinds(one.questions)}")
    published = Limits.published(weights)
    longest = min(published.max_new_tokens, args.max_new_tokens) if args.method == "hawk" else 1
    limits = Limits(published.min_pixels, published.max_pixels, longest)
    placement = Placement(args.device, args.dtype, args.attention).resolve()
    session = Session(weights, placement, limits, args.trust_remote_code)
    out = args.out or Path(f"{args.method}_{args.model}.json")
    if args.method == "hawk":
        numbers, record = heads.calibrate_heads(session, sets, out, args.layers, tell), ".ablation.json"
    else:
        numbers, record = layers.calibrate_layers(session, sets, out, progress=tell), ".made.json"
    say(f"{out}: {' '.join(f'{one:.4f}' for one in numbers)}")
    tell(f"what they were made from: {out.with_suffix(record)}")
    return 0
