"""Teacher-forced accuracies on validation scenes, for the training curve."""

from __future__ import annotations

from typing import Any

import torch

from ivcp_eval.lab.tiny2.processor import build_tokenizer
from ivcp_eval.lab.tiny2.training.batches import IGNORED, TextBatch
from ivcp_eval.tiny.validation import overlap, parse_box


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
            right, said = (_decode(t[chosen].tolist()) for t in (labels, got))
            hits.setdefault(name, []).extend(_verdicts(sample.task, right, said, bool((labels == got)[chosen].all())))


def _verdicts(task: str, right: str, said: str, same: bool) -> list[float]:
    if task == "grounding":
        return [float(overlap(parse_box(said), parse_box(right)) >= 0.5)]
    if task == "list":
        pairs = zip(right.split("\n"), said.split("\n"), strict=False)
        boxes = [(parse_box(r), parse_box(s)) for r, s in pairs]
        return [float(overlap(s, r) >= 0.5) for r, s in boxes if r]
    if task == "point":
        numbers = [[int(v) for v in t.strip("[]").split(", ") if v.isdigit()] for t in (right, said)]
        return [float(len(numbers[1]) == 2 and all(abs(a - b) <= 24 for a, b in zip(*numbers, strict=True)))]
    return [float(same)]


def _decode(ids: list[int]) -> str:
    return build_tokenizer().decode(ids).strip()


def means(hits: dict[str, list[float]]) -> dict[str, Any]:
    """Mean of every entry."""
    return {name: sum(values) / len(values) for name, values in sorted(hits.items()) if values}
