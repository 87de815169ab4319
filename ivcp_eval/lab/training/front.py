"""Hold what VisPCO's network learned to what `ivcp tune` found: ``ivcp lab front --weights FILE --tuned CSV``.

For every budget of FLOPs that the candidates of a FastV search stand for: the layer and share that the network plans
(mean over prompts of the validation split), and what the candidate at that layer scored beside the best one. Give
`ivcp tune` one rung (``--first N --samples N``), or candidates that left early are compared on fewer samples.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ivcp_eval.files import atomic_write
from ivcp_eval.interface import models
from ivcp_eval.lab.training.examples import examples_for
from ivcp_eval.lab.training.frozen import Frozen
from ivcp_eval.lab.training.part import default_config
from ivcp_eval.lab.training.parts.vispco import EveryLayer, Part, Planner
from ivcp_eval.methods._trained import network
from ivcp_eval.runs.planning.numbers import COUNT
from ivcp_eval.runs.planning.placement import Placement


@dataclass(frozen=True)
class Learned:
    """What is planned for one budget, mean over prompts.

    Attributes:
        k, r: as the network says. layer: whose input is cut first; None where no layer is. flops: share of the unpruned
            prefill.
    """

    k: float
    r: float
    layer: int | None
    flops: float


def learned(part: Part, prompts: Sequence[Any], flops: float) -> Learned:
    """The plan for a share ``flops`` of the unpruned prefill's FLOPs, for encoded examples.

    Raises:
        ValueError: text alone costs more.
    """
    found = []
    for prompt in prompts:
        signals = part.frozen.signals(prompt, EveryLayer(), 0.5)
        text, visual, shape = signals.text.numel(), signals.n_visual, part.shape
        least = shape.prefill_flops([text] * shape.layers) / shape.prefill_flops([text + visual] * shape.layers)
        if flops <= least:
            raise ValueError(f"flops={flops:g} is no more than the {least:.2g} that the text of a prompt costs alone")
        with torch.no_grad():
            plan = part.plan(signals, (flops - least) / (1 - least))
        found.append((float(plan.k), float(plan.r), least + (1 - least) * float(plan.added)))
    k, r, cost = (sum(values) / len(values) for values in zip(*found, strict=True))
    layer = max(part.frozen.session.adapter.facts(part.frozen.model.config, "").first_cut + 1, -int(-k // 1))
    return Learned(k, r, layer if layer < part.shape.layers else None, cost)


def compare(tuned: Sequence[Mapping[str, str]], plan: Any) -> list[dict[str, Any]]:
    """One row for each budget of the search: its best layer, and the learned one.

    Args:
        tuned: rows of `ivcp tune`'s CSV. plan: ``plan(flops)`` gives `Learned`.

    Raises:
        ValueError: no candidates of FastV that hold FLOPs.
    """
    candidates = [row for row in tuned if row["method"] == "fastv" and row["budget"].startswith("flops")]
    if not candidates:
        raise ValueError(
            "the search has no candidates of fastv that hold FLOPs: `ivcp tune --methods fastv --budget flops=B`"
        )
    rows = []
    for asked in sorted({float(row["asked"]) for row in candidates}, reverse=True):
        own = {json.loads(row["parameters"]).get("layer", 2): row for row in candidates if float(row["asked"]) == asked}
        best = max(own, key=lambda layer: float(own[layer]["score"]))
        found = plan(asked)
        chosen = own.get(found.layer)
        rows.append(
            {
                "flops": asked,
                "n": own[best]["n"],
                "grid_layer": best,
                "grid_kept": float(own[best]["ratio"]),
                "grid_score": float(own[best]["score"]),
                "learned_k": found.k,
                "learned_r": found.r,
                "learned_flops": found.flops,
                "learned_layer": "" if found.layer is None else found.layer,
                "learned_score": float(chosen["score"]) if chosen else "",
                "rank": 1 + sum(float(r["score"]) > float(chosen["score"]) for r in own.values()) if chosen else "",
                "of": len(own),
                "learned_low": _shifted(chosen, "difference_low") if chosen else "",
                "learned_high": _shifted(chosen, "difference_high") if chosen else "",
            }
        )
    return rows


def _shifted(row: Mapping[str, str], end: str) -> float:
    """An end of the interval of a candidate's score: that of its difference, moved by the unpruned model's score."""
    return float(row["score"]) - float(row["difference"]) + float(row[end])


def main(arguments: list[str] | None = None) -> int:
    """Command line: print the table, and write it with ``--out``."""
    parser = argparse.ArgumentParser(prog="ivcp lab front", description=__doc__)
    parser.add_argument("--model", default="tiny", help="short name (default: %(default)s)")
    parser.add_argument("--weights", type=Path, required=True, help="what `ivcp lab train vispco` wrote")
    parser.add_argument("--tuned", type=Path, required=True, help="CSV of `ivcp tune --methods fastv --budget flops=B`")
    parser.add_argument(
        "--prompts", type=COUNT, default=8, help="validation prompts to plan for (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="CSV to write")
    args = parser.parse_args(arguments)
    config = yaml.safe_load(default_config("vispco").read_text(encoding="utf-8"))
    frozen = Frozen(models.locate(args.model, None), Placement("", "", "sdpa"))
    examples = examples_for(frozen, None, config["kinds"], config["seed"])
    prompts = [frozen.encoded(examples.validation(number)) for number in range(args.prompts)]
    part = Part(frozen, config["part"], prompts[0])
    part.net = network(args.weights, "vispco", Planner.of, next(frozen.model.parameters()).device)
    with args.tuned.open(newline="", encoding="utf-8") as stream:
        rows = compare(list(csv.DictReader(stream)), lambda flops: learned(part, prompts, flops))
    text = [{key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows]
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(text[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(text)
    sys.stdout.write(table.getvalue())
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.out) as stream:
            stream.write(table.getvalue())
    return 0
