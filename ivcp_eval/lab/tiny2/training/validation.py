"""Teacher-forced accuracies on validation scenes, for the training curve."""

from __future__ import annotations

from typing import Any

import torch

from ivcp_eval.lab.tiny.training.validation import BOX_START, overlap, parse_box
from ivcp_eval.lab.tiny2.processor import build_tokenizer
from ivcp_eval.lab.tiny2.training.batches import IGNORED, TextBatch


def predictions(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Most likely token at every label, -100 elsewhere."""
    predicted = torch.full_like(labels, IGNORED)
    predicted[labels != IGNORED] = logits.argmax(-1)
    return predicted


def score(hits: dict[str, list[float]], batch: TextBatch, predicted: torch.Tensor) -> None:
    """Add to ``hits`` the verdict on every answer of ``batch``, by task and category.

    A box is right at an IoU of at least 0.5, a point within 24 pixels in both directions, in a list every box counts
    on its own; anything else is right if every token is.
    """
    for row, samples in enumerate(batch.samples):
        start = 0
        slots = [length for count, length in batch.layout.groups for _ in range(count)]
        for sample, length in zip(samples, slots, strict=True):
            place = slice(start, start + length)
            start += length
            if sample is None:
                continue
            labels, got = batch.labels[row, place].cpu(), predicted[row, place].cpu()
            chosen = labels != IGNORED
            name = sample.task if sample.task == sample.category else f"{sample.task}_{sample.category}"
            hits.setdefault(name, []).extend(_verdicts(sample.task, labels[chosen].tolist(), got[chosen].tolist()))


def _verdicts(task: str, right: list[int], said: list[int]) -> list[float]:
    if task == "point":
        numbers = [[int(v) for v in _decode(ids).strip("[]").split(", ") if v.isdigit()] for ids in (right, said)]
        return [float(len(numbers[1]) == 2 and all(abs(a - b) <= 24 for a, b in zip(*numbers, strict=True)))]
    if task not in ("grounding", "list"):
        return [float(right == said)]
    # The format counts too: an untrained model that repeats its input repeats the right box, one token too late.
    opening = build_tokenizer().token_to_id(BOX_START)
    in_place = all(s == opening for r, s in zip(right, said, strict=True) if r == opening)
    pairs = zip(_decode(right).split("\n"), _decode(said).split("\n"), strict=False)
    boxes = [(parse_box(r), parse_box(s)) for r, s in pairs]
    return [float(in_place and overlap(s, r) >= 0.5) for r, s in boxes if r]


def _decode(ids: list[int]) -> str:
    return build_tokenizer().decode(ids).strip()


def means(hits: dict[str, list[float]]) -> dict[str, Any]:
    """Mean of every entry."""
    return {name: sum(values) / len(values) for name, values in sorted(hits.items()) if values}
