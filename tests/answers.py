"""Answers as a model would have given them."""

from __future__ import annotations

from typing import Any

from ivcp_eval.interface.records import Answer


def answer(text: str = "A", visual: int = 4, kept: int = 2, **more: Any) -> Answer:
    """A good answer of a model with one layer."""
    counts: dict[str, Any] = {"visual_tokens": visual, "visual_kept": kept, "text_tokens": 1, "new_tokens": 1}
    return Answer(**{"prediction": text, "visual_per_layer": (kept,), "visual_cached": (kept,), **counts, **more})
