"""Training batches of clips as real video tokens: the embedded video benchmark's worlds from the training split.

Besides the benchmark's choice, whose options stand in any order here, a clip is asked for the objects of all its
pictures with their boxes: the dense signal of a clip, as the list of all objects is of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ivcp_eval.lab.tiny.tasks import name_of
from ivcp_eval.lab.tiny2.clips import SECONDS_A_STEP, SIDE, STEPS, Clip, Frame, Group, choice, draw
from ivcp_eval.lab.tiny2.processor import TOKENS_PER_SECOND
from ivcp_eval.lab.tiny2.scenes import CELL, scene_rng
from ivcp_eval.lab.tiny2.tasks import LIST_PROMPT, Sample, format_box
from ivcp_eval.lab.tiny2.training.batches import BEFORE_PICTURES, TextBatch, encode, pack
from ivcp_eval.lab.tiny2.training.decoder import Groups, Layout

#: What a clip shows beside its objects; no list names it.
SCENERY = ("door", "cover")


def make_clip_batch(split: str, first: int, count: int, phase: dict[str, Any]) -> TextBatch:
    """Rows ``first`` .. ``first + count - 1`` of ``split``: a clip each of the categories in ``clips``, and questions.

    Kinds of questions: ``list`` (the objects of every picture), ``choice`` (the benchmark's question) and ``say`` (the
    same without options).
    """
    groups = tuple((len(group["kinds"]), group["tokens"]) for group in phase["groups"])
    images, rows = [], []
    samples: list[list[Sample | None]] = []
    for index in range(first, first + count):
        rng = scene_rng(split, index)
        group, clip, pictures = draw(rng, phase["clips"])
        images.append(pictures)
        asked = [[_ask(rng, kind, group, clip) for kind in part["kinds"]] for part in phase["groups"]]
        rows.append(pack(asked, groups))
        samples.append([sample for own in asked for sample in own])
    return TextBatch.of(images, prefix_ids(), rows, layout_for(groups), samples)


def _ask(rng: np.random.Generator, kind: str, group: Group, clip: Clip) -> Sample:
    if kind == "list":
        return Sample("list", "clip_list", LIST_PROMPT, "\n".join(_shown(frame) for frame in clip.frames))
    if kind == "choice":
        return choice(rng, group, clip)
    if kind == "say":
        return Sample("short", "clip", group.question, group.options[clip.answer])
    raise ValueError(f"unknown kind of question {kind!r} about a clip; known: list, choice, say")


def _shown(frame: Frame) -> str:
    """A picture's objects with their boxes from left to right, as far as nothing on top hides them."""
    seen = [
        item
        for place, item in enumerate(frame)
        if item.colour not in SCENERY and not any(_inside(item.box, other.box) for other in frame[place + 1 :])
    ]
    return " ".join(name_of(o) + format_box(o.box) for o in sorted(seen, key=lambda o: (o.box[0], o.box[1]))) or "none"


def _inside(inner: Sequence[int], outer: Sequence[int]) -> bool:
    return all(a >= b for a, b in zip(inner[:2], outer[:2], strict=True)) and all(
        a <= b for a, b in zip(inner[2:], outer[2:], strict=True)
    )


@lru_cache(maxsize=1)
def prefix_ids() -> list[int]:
    """Token ids of everything before the question."""
    cells = STEPS * (SIDE // CELL) ** 2
    clip = [*encode("<|vision_start|>"), *encode("<|video_pad|>") * cells, *encode("<|vision_end|>")]
    return [*encode(BEFORE_PICTURES), *clip]


@lru_cache(maxsize=16)
def layout_for(groups: Groups) -> Layout:
    """Layout of a sequence with a clip, each token at its lone position; ``layout_for`` of pictures has the rest."""
    side = SIDE // CELL
    cells = torch.arange(STEPS * side * side)
    start = len(encode(BEFORE_PICTURES)) + 1
    apart = int(SECONDS_A_STEP * TOKENS_PER_SECOND)
    places = torch.stack((cells // (side * side) * apart, cells // side % side, cells % side)) + start
    at = start + side  # as behind a picture: the time takes no room
    pieces = [torch.arange(start).expand(3, -1), places, torch.tensor([at]).expand(3, -1)]
    pieces += [(torch.arange(length) + at + 1).repeat(count).expand(3, -1) for count, length in groups]
    return Layout(start + len(cells) + 1, groups, torch.cat(pieces, dim=1), cells + start)
