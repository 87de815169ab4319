"""Check a model's wiring on its real weights, once, before trusting a number made with them."""

from __future__ import annotations

import argparse

from ivcp_eval.cli import notices, say
from ivcp_eval.runs.planning.numbers import SHARE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ivcp check-model``."""
    parser.add_argument("model", help="short name, see `ivcp list --models`")
    parser.add_argument("--path", help="local folder with the checkpoint")
    parser.add_argument("--ratio", type=SHARE, default=0.5, help="of the answer shown (default: %(default)s)")
    for option in ("device", "dtype", "attention"):
        parser.add_argument(f"--{option}", default="", help="default: found")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow a checkpoint's own code to run")


def run(args: argparse.Namespace) -> int:
    """Load, describe, check, and show one pruned answer beside the unpruned one; exit code 1 if a check failed."""
    import torch

    from ivcp_eval.interface import models
    from ivcp_eval.interface.variants import Variant
    from ivcp_eval.lab.model_check import QUESTION, check_model, picture
    from ivcp_eval.runs.answering.session import Session
    from ivcp_eval.runs.planning.placement import Limits, Placement

    weights = models.locate(args.model, args.path)
    placement = Placement(args.device, args.dtype, args.attention).resolve()
    published = Limits.published(weights)
    limits = Limits(published.min_pixels, published.max_pixels, min(published.max_new_tokens, 64))
    session = Session(weights, placement, limits, args.trust_remote_code)
    size = sum(p.numel() * p.element_size() for p in session.model.parameters())
    tell = notices(args)
    tell(
        f"{args.model}: {type(session.model).__name__}, {weights.family} family, revision {weights.revision}, "
        f"{placement.dtype}, {placement.attention}, {placement.device}, weights {size / 2**20:,.0f} MiB"
    )
    if placement.device.startswith("cuda"):
        tell(f"GPU memory in use: {torch.cuda.memory_allocated() / 2**20:,.0f} MiB of {torch.cuda.get_device_name()}")
    failures = check_model(session, say)
    parts = [{"image": picture()}, {"text": QUESTION}]
    for variant in (Variant(args.model), Variant(args.model, "ivc_prune", args.ratio)):
        answer = session.answer(parts, variant)
        say(f"{variant.name} ({answer.visual_kept} of {answer.visual_tokens} visual tokens): {answer.prediction!r}")
    say("every check passed" if not failures else f"{len(failures)} checks failed; do not trust numbers of this model")
    return 1 if failures else 0
