"""Quick teacher-forced accuracies on the validation split, for the training curve."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ivcp_eval.lab.tiny.scenes import Box, sample_scene, scene_rng
from ivcp_eval.lab.tiny.training.batches import IGNORED, SLOTS, choose_questions, make_batch, tokenizer
from ivcp_eval.lab.tiny.training.fast import EAGER, Kernels
from ivcp_eval.lab.tiny.training.losses import answer_logits

BOX_START = '{"bbox_2d": ['
_NUMBERS = re.compile(r"\d+")


def parse_box(text: str) -> Box | None:
    """Return the first four integers of ``text`` as a box, or None."""
    numbers = [int(v) for v in _NUMBERS.findall(text.replace("bbox_2d", ""))][:4]
    return (numbers[0], numbers[1], numbers[2], numbers[3]) if len(numbers) == 4 else None


def overlap(first: Box | None, second: Box | None) -> float:
    """Intersection over union of two boxes; 0 if one is missing or empty."""
    if first is None or second is None:
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [max(0, b[2] - b[0]) * max(0, b[3] - b[1]) for b in (first, second)]
    return width * height / (sum(areas) - width * height)


@torch.no_grad()
def teacher_forced(
    model: Any,
    objects: tuple[int, int],
    sizes: list[tuple[int, int]],
    images_per_size: int = 24,
    kernels: Kernels = EAGER,
) -> dict[str, float]:
    """Accuracy of every kind of question given the right previous tokens (grounding: IoU of at least 0.5)."""
    hits: dict[str, list[float]] = {}
    for number, size in enumerate(sizes):
        first = number * images_per_size
        batch = make_batch("validation", first, images_per_size, size, objects)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = torch.full_like(batch.labels, IGNORED)
            logits = answer_logits(model, batch, torch.bfloat16, kernels)[0]
        predicted[batch.labels != IGNORED] = logits.argmax(-1)
        for row in range(images_per_size):
            rng = scene_rng("validation", first + row)
            scene = sample_scene(rng, size, objects)
            _score_row(hits, choose_questions(rng, scene), batch.labels[row], predicted[row])
    return {name: sum(values) / len(values) for name, values in sorted(hits.items())}


def _score_row(hits: dict[str, list[float]], questions: tuple[list[Any], ...], labels: Tensor, got: Tensor) -> None:
    start = 0
    for (count, length), samples in zip(SLOTS, questions, strict=True):
        for slot, sample in enumerate(samples):
            place = slice(start + slot * length, start + (slot + 1) * length)
            mask = labels[place] != IGNORED
            right = bool((labels[place] == got[place])[mask].all())
            if sample.task == "grounding":
                text = tokenizer().decode(got[place][mask].tolist())
                # The format counts too: an untrained model that repeats its input repeats the right box, too late.
                right = text.startswith(BOX_START) and overlap(parse_box(text), sample.box) >= 0.5
            hits.setdefault(f"{sample.task}_{sample.category}", []).append(float(right))
        start += count * length
