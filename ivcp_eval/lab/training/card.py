"""The card of a trained part: what it is, what it was trained on, and what that cost."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ivcp_eval.files import file_digest
from ivcp_eval.lab.training.loop import Loop
from ivcp_eval.runs.records.scores import Made


def card(about: Mapping[str, Any], loop: Loop, weights: Path) -> str:
    """Markdown about a finished run. ``about``: what `Loop` was given."""
    made = Made.now("variant", timing=True)
    steps, batch = loop.progress["steps"], loop.config["batch"]
    n = sum(p.numel() for p in loop.part.net.parameters())
    trained_on = ", ".join(f"{key} {value}" for key, value in about["examples"].items())
    return "\n".join(
        [
            f"# {about['part']}, trained on {about['model']}",
            "",
            loop.part.origin,
            "",
            f"* Weights: `{weights.name}`, {n:,} parameters, sha256 {file_digest(weights)}",
            f"* Model: {about['model']}, revision {about['revision']}, {about['dtype']}",
            f"* Examples: {steps * batch:,} ({steps:,} steps of {batch}); {trained_on}",
            f"* Cost: {loop.progress['seconds']:.0f} s of CPU, {torch.get_num_threads()} thread(s), "
            f"{platform.machine()}, torch {torch.__version__}",
            f"* Code: commit {made.commit}{' with changes' if made.dirty else ''}, {made.date}",
            "",
            "Loss and validation loss: `curve.csv`. Configuration:",
            "",
            "```yaml",
            yaml.safe_dump(loop.config, sort_keys=False).rstrip(),
            "```",
            "",
        ]
    )
