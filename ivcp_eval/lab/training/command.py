"""Train what a method reads from a file: ``ivcp lab train NAME --model M [--config FILE] [--data FILE] [--out DIR]``.

The model itself stays as it is. Interrupt it whenever you like: the same command goes on. Then
``ivcp eval --model M --method NAME --set weights=OUT/NAME_M.safetensors``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ivcp_eval.files import atomic_write
from ivcp_eval.interface import models
from ivcp_eval.lab.training.card import card
from ivcp_eval.lab.training.examples import examples_for
from ivcp_eval.lab.training.frozen import Frozen
from ivcp_eval.lab.training.loop import Loop
from ivcp_eval.lab.training.part import default_config, part_class
from ivcp_eval.lab.training_log import say, write_tensors
from ivcp_eval.methods._trained import PART
from ivcp_eval.runs.planning.numbers import AMOUNT, COUNT, INDEX, POSITIVE, Number
from ivcp_eval.runs.planning.placement import Placement

#: What the loop's own settings may be; a part checks its section itself.
NUMBERS: Mapping[str, Number] = {
    **dict.fromkeys(("steps", "batch", "distinct", "log_every", "validate_every", "validation"), COUNT),
    **dict.fromkeys(("rate", "clip"), POSITIVE),
    **dict.fromkeys(("seed", "warmup"), INDEX),
    **dict.fromkeys(("weight_decay", "save_every"), AMOUNT),
}


def configuration(name: str, given: Path | None) -> dict[str, Any]:
    """The shipped configuration of a part, with what a file says otherwise.

    Raises:
        ValueError: a key that the shipped one has not, or a number that cannot be meant.
    """
    config: dict[str, Any] = yaml.safe_load(default_config(name).read_text(encoding="utf-8"))
    own: dict[str, Any] = yaml.safe_load(given.read_text(encoding="utf-8")) or {} if given else {}
    if strange := sorted({*own} - {*config} | {*own.get("part", {})} - {*config["part"]}):
        raise ValueError(
            f"{given} has {', '.join(strange)}, which the training of {name} does not know; it knows "
            f"{', '.join([*config, *(f'part.{key}' for key in config['part'])])}"
        )
    for key, kind in NUMBERS.items():
        if key in own and not kind.fits(own[key]):
            raise ValueError(f"{given}: {key} must be {kind}, got {own[key]!r}")
    return {**config, **own, "part": {**config["part"], **own.get("part", {})}}


def train(
    name: str, frozen: Frozen, config: dict[str, Any], data: Path | None, out: Path, seconds: float = float("inf")
) -> Path | None:
    """Train a part in the folder ``out``; the file of its weights, or None where the time was up before.

    Raises:
        ValueError: as `examples_for` and `Loop.load`.
    """
    out.mkdir(parents=True, exist_ok=True)
    examples = examples_for(frozen, data, config["kinds"], config["seed"])
    torch.manual_seed(config["seed"])  # of the network's first weights
    part = part_class(name)(frozen, config["part"], frozen.encoded(examples.training(0)))
    about: dict[str, Any] = {
        "part": name,
        "model": frozen.weights.checkpoint.name,
        "revision": frozen.weights.revision,
        "dtype": frozen.placement.dtype,
        "config": config,
        "examples": dict(examples.about),
    }
    loop = Loop(part, examples, config, out, about, say)
    if not loop.run(seconds):
        return None
    stem = f"{name}_{frozen.weights.checkpoint.name}"
    weights = out / f"{stem}.safetensors"
    facts = {PART: name, "model": about["model"], "revision": about["revision"]}
    write_tensors(weights, part.net.state_dict(), facts)
    part.finish(out)
    with atomic_write(out / f"{stem}.md") as stream:
        stream.write(card(about, loop, weights))
    return weights


def main(arguments: list[str]) -> int:
    """Command line, the part's name first; 0 whether all steps are done or the time is up."""
    name = arguments[0]
    parser = argparse.ArgumentParser(prog=f"ivcp lab train {name}", description=__doc__)
    parser.add_argument("--model", default="tiny2", help="short name (default: %(default)s)")
    parser.add_argument("--path", help="local folder with the checkpoint")
    parser.add_argument("--config", type=Path, help=f"YAML with what differs from {default_config(name)}")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="JSONL or TSV with image or image_path, question and, if known, answer, of a training split "
        "(default: generated training scenes of an embedded model)",
    )
    parser.add_argument("--out", type=Path, help="folder of state, curve, weights and card (default: NAME_MODEL)")
    parser.add_argument("--minutes", type=POSITIVE, default=float("inf"), help="stop, resumably, after this time")
    for option in ("device", "dtype"):
        parser.add_argument(f"--{option}", default="", help="default: found")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow a checkpoint's own code to run")
    args = parser.parse_args(arguments[1:])
    config = configuration(name, args.config)
    frozen = Frozen(
        models.locate(args.model, args.path), Placement(args.device, args.dtype, "sdpa"), args.trust_remote_code
    )
    out = args.out or Path(f"{name}_{args.model}")
    weights = train(name, frozen, config, args.data, out, 60 * args.minutes)
    say(f"done: {weights}" if weights else f"the time is up; the same command goes on from {out}")
    return 0
