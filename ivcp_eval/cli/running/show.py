"""Draw which parts of a picture, or of the frames of a video, a method keeps, with the answers.

Dropped cells are darkened, those whose tokens were merged into others are outlined in blue, boxes that the model
answers are orange. There is one panel for the unpruned model and one for each cut of each method.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ivcp_eval.cli import notices, say
from ivcp_eval.runs.planning.numbers import COUNT, INDEX, SHARE
from ivcp_eval.runs.planning.options import Options, add_flags, given_flags

_OF_VIDEOS = ("nframe", "fps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ivcp show``."""
    parser.add_argument("image", metavar="IMAGE", help="a picture file, or a video file with --nframe or --fps")
    parser.add_argument("question", metavar="QUESTION", help="what the model is asked")
    parser.add_argument("--model", default="tiny", help="short name, see `ivcp list --models` (default: %(default)s)")
    parser.add_argument("--model-path", help="local folder with the checkpoint")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["ivc_prune"],
        metavar="METHOD",
        help="see `ivcp list`, or files with a class Method, e.g. ./mine.py (default: ivc_prune)",
    )
    parser.add_argument("--ratio", type=SHARE, default=0.5, help="share of visual tokens kept (default: %(default)s)")
    parser.add_argument(
        "--budget",
        default="own",
        metavar="KIND",
        help="what --ratio is a share of, as of `ivcp eval` (default: %(default)s)",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="parameters of every method named, e.g. layer=16"
    )
    add_flags(parser, _OF_VIDEOS)
    parser.add_argument("--out", type=Path, default=Path("kept.png"), help=".png or .svg file (default: %(default)s)")
    parser.add_argument(
        "--kind",
        choices=("grounding", "yes_no", "short_answer"),
        help="put the question into the family's wording of that kind (default: as it stands)",
    )
    parser.add_argument("--seed", type=INDEX, default=0, help="of methods that draw (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=COUNT, default=128, metavar="N", help="at most (default: %(default)s)")
    for option in ("device", "dtype", "attention"):
        parser.add_argument(f"--{option}", default="", help="default: found")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow a checkpoint's own code to run")


def run(args: argparse.Namespace) -> int:
    """Answer the question unpruned and with each method, and draw all of it."""
    from ivcp_eval.interface.records.drawing import Drawing, Row, checked_path

    checked_path(args.out)  # before a model is loaded
    from PIL import Image

    from ivcp_eval.benchmarks import clips
    from ivcp_eval.benchmarks.boxes import FORMATS, parse_answer
    from ivcp_eval.benchmarks.pictures import decoded
    from ivcp_eval.interface import models
    from ivcp_eval.interface.records.masks import Masks
    from ivcp_eval.interface.records.sheets import sheet_of, sheet_of_masks
    from ivcp_eval.interface.registry import default_parameters, make_method, name_of, read_parameters
    from ivcp_eval.interface.variants import CostTarget, Variant, parameter
    from ivcp_eval.runs.answering.session import Session
    from ivcp_eval.runs.planning.placement import Limits, Placement

    sampling = Options(**given_flags(args, _OF_VIDEOS)).sampling
    clip = clips.decode(Path(args.image), sampling) if sampling else None
    picture = None if clip else decoded(args.image, turned=True)
    parameters = dict(parameter(text) for text in args.set)
    target = CostTarget.of(args.budget, args.ratio)
    methods = [name_of(method) for method in args.methods]
    for method in methods:
        make_method(method, parameters)  # a name or value that is wrong is said before a model is loaded
    weights = models.locate(args.model, args.model_path)
    published = Limits.published(weights)
    limits = Limits(published.min_pixels, published.max_pixels, min(published.max_new_tokens, args.max_new_tokens))
    placement = Placement(args.device, args.dtype, args.attention).resolve()
    variants = [Variant(args.model)]
    for method in methods:
        own = weights.checkpoint.methods.get(method, {})
        variant = Variant(args.model, method, args.ratio, read_parameters(method, parameters), args.seed, target)
        variants.append(variant.tuned(own, default_parameters(method)))
    if target:
        from ivcp_eval.engine.cost.predicted import Decoder, solve_budget

        decoder = Decoder.of(weights)
        variants = [solve_budget(variant, decoder) for variant in variants]
    session = Session(weights, placement, limits, args.trust_remote_code)
    for variant in variants:
        session.check(variant)
    wording = session.adapter.prompt(args.kind, args.question, {}) if args.kind else None
    shown = {"video": args.image, **vars(sampling)} if sampling else {"image": picture}
    rows, steps = [], 0
    for variant in variants:
        answer = session.answer([shown, {"text": wording or args.question}], variant, grounding=clip is None)
        masks = Masks.from_text(answer.masks) if answer.masks else None
        if masks and clip:
            steps, masks = len(masks.images), sheet_of_masks(masks)
        kept = f"{answer.visual_kept} of {answer.visual_tokens} tokens"
        say(f"{variant.name} ({kept}): {answer.prediction!r}")
        box = parse_answer(answer.box or "", FORMATS["unit"])
        of = f" of {variant.budget.label}" if variant.budget else ""
        title = f"{variant.method} {variant.requested:g}{of}" if variant.method != "none" else "unpruned"
        rows.append(Row(f"{title}: {kept}", f"{args.question} -> {answer.prediction}", masks, box))
    if clip:
        frames = [Image.fromarray(frame) for frame in clip.frames]
        picture = sheet_of(frames, clip.seconds, steps or len(frames))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Drawing(picture, rows).save(args.out)
    notices(args)(f"drawn in {args.out}")
    return 0
