"""Training batches: scenes of one size with what the tower's heads or the decoder are to say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ivcp_eval.lab.tiny.processor import SYSTEM_PROMPT
from ivcp_eval.lab.tiny2 import tasks
from ivcp_eval.lab.tiny2.processor import build_tokenizer, coordinate_ids
from ivcp_eval.lab.tiny2.scenes import CELL, Scene, moved, render, sample_scene, scene_rng
from ivcp_eval.lab.tiny2.tasks import Sample
from ivcp_eval.lab.tiny2.training.decoder import Groups, Layout
from ivcp_eval.lab.tiny2.training.tower import what_targets

BEFORE_PICTURES = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
BEFORE_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
IGNORED = -100
#: Seeds of the places of windows start here, behind all scenes.
WINDOWS = 1 << 40
#: Weights of an answer's tokens: brackets and names in lists; a box's first coordinate, which chooses the object for
#: the others; the others; words; what is said of a clip; the letter of an option. The last two are one or two tokens
#: beside whole lists, and are not learned in time without more weight (docs/LOG.md).
MARK_WEIGHT, FIRST_WEIGHT, COORDINATE_WEIGHT, WORD_WEIGHT = 0.1, 3.0, 1.0, 3.0
CLIP_WEIGHT, LETTER_WEIGHT = 9.0, 12.0


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of ``text``."""
    return tuple(build_tokenizer().encode(text).ids)


@dataclass
class TowerBatch:
    """Pictures (batch, height, width, 3) uint8 and the classes of what lies under each cell."""

    images: Tensor
    targets: dict[str, Tensor]

    def to(self, device: torch.device) -> TowerBatch:
        """The batch on ``device``."""
        return TowerBatch(self.images.to(device), {k: v.to(device) for k, v in self.targets.items()})


@dataclass
class TextBatch:
    """Questions about pictures of one size, the same number of pictures in every row.

    Attributes:
        images: (batch, pictures, height, width, 3) uint8.
        ids: (batch, tokens) int64, the pictures' tokens included.
        labels: (batch, slot tokens) next token of every slot token, or -100.
        weights: (batch, slot tokens) weight of each label.
        layout: layout of the sequence.
        samples: per row, the question of every slot in order, None for an empty one.
    """

    images: Tensor
    ids: Tensor
    labels: Tensor
    weights: Tensor
    layout: Layout
    samples: list[list[Sample | None]]

    @classmethod
    def of(
        cls,
        images: Sequence[NDArray[np.uint8]],
        prefix: list[int],
        rows: Sequence[tuple[list[int], list[int], list[float]]],
        layout: Layout,
        samples: list[list[Sample | None]],
    ) -> TextBatch:
        """From the pictures of each row, the token ids before every question, and what `pack` made of the questions."""
        ids, labels, weights = zip(*rows, strict=True)
        packed = torch.tensor([prefix + row for row in ids]), torch.tensor(labels), torch.tensor(weights)
        return cls(torch.from_numpy(np.stack(images)), *packed, layout, samples)

    def to(self, device: torch.device) -> TextBatch:
        """The batch on ``device``."""
        moved = {name: getattr(self, name).to(device) for name in ("images", "ids", "labels", "weights", "layout")}
        return replace(self, **moved)


def make_tower_batch(split: str, first: int, count: int, size: tuple[int, int], phase: dict[str, Any]) -> TowerBatch:
    """The scenes ``first`` .. ``first + count - 1`` of ``split``."""
    scenes = [draw(scene_rng(split, index), size, phase) for index in range(first, first + count)]
    return TowerBatch(torch.from_numpy(np.stack([render(s) for s in scenes])), what_targets(scenes))


def make_text_batch(split: str, first: int, count: int, size: tuple[int, int], phase: dict[str, Any]) -> TextBatch:
    """Rows ``first`` .. ``first + count - 1`` of ``split``: ``pictures`` scenes each, and the phase's questions."""
    pictures = phase.get("pictures", 1)
    groups = tuple((len(group["kinds"]), group["tokens"]) for group in phase["groups"])
    images, rows, samples = [], [], []
    frame = tuple(phase.get("frame", size))
    origin = window_origin(split, first, size, frame)
    for index in range(first, first + count):
        rng = scene_rng(split, index)
        scenes = [moved(draw(rng, size, phase), origin) for _ in range(pictures)]
        asked = [ask(rng, scenes, group["kinds"]) for group in phase["groups"]]
        images.append(np.stack([render(scene) for scene in scenes]))
        rows.append(pack(asked, groups))
        samples.append([s for own, (n, _) in zip(asked, groups, strict=True) for s in [*own, *[None] * (n - len(own))]])
    return TextBatch.of(
        images, prefix_ids(size, pictures), rows, layout_for(size, pictures, groups, origin, frame), samples
    )


def window_origin(split: str, first: int, size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """Where the pictures of the batch from ``first`` on lie in ``frame`` (width, height), on whole cells."""
    if size == frame:
        return 0, 0
    rng = scene_rng(split, WINDOWS + first)
    x, y = (int(rng.integers((whole - part) // CELL + 1)) * CELL for whole, part in zip(frame, size, strict=True))
    return x, y


def draw(rng: np.random.Generator, size: tuple[int, int], phase: dict[str, Any]) -> Scene:
    """A scene in the size and crowd of ``phase``."""
    return sample_scene(rng, size, tuple(phase["objects"]), phase.get("sign_percent", 25))


def ask(rng: np.random.Generator, scenes: Sequence[Scene], kinds: Sequence[str]) -> list[Sample]:
    """A question of each of ``kinds`` that its scene offers; with several scenes each names its picture."""
    if len(scenes) == 1:
        return tasks.pick(rng, scenes[0], kinds)
    found = []
    for kind in kinds:
        number = int(rng.integers(len(scenes)))
        found += [replace(s, picture=number + 1) for s in tasks.pick(rng, scenes[number], [kind])]
    return found


def prefix_ids(size: tuple[int, int], pictures: int) -> list[int]:
    """Token ids of everything before the question."""
    cells = (size[0] // CELL) * (size[1] // CELL)
    one = [*encode("<|vision_start|>"), *encode("<|image_pad|>") * cells, *encode("<|vision_end|>")]
    return [*encode(BEFORE_PICTURES), *one * pictures]


@lru_cache(maxsize=64)
def layout_for(
    size: tuple[int, int],
    pictures: int,
    groups: Groups,
    origin: tuple[int, int] = (0, 0),
    frame: tuple[int, int] | None = None,
) -> Layout:
    """Layout of a sequence with ``pictures`` of ``size`` (width, height) pixels, each token at its lone position.

    The pictures may be windows at ``origin`` of larger ones, ``frame``: their tokens stand where they would there.
    """
    columns, rows = size[0] // CELL, size[1] // CELL
    cells = torch.arange(rows * columns)
    start = len(encode(BEFORE_PICTURES)) + 1
    pieces, visual, at = [torch.arange(start).expand(3, -1)], [], start
    for picture in range(pictures):
        visual.append(cells + start + picture * (len(cells) + 2))
        places = (torch.zeros_like(cells), cells // columns + origin[1] // CELL, cells % columns + origin[0] // CELL)
        pieces.append(torch.stack(places) + at)
        at += max(rows, columns) if frame is None else max(frame) // CELL
        # The picture's end, and the next one's start.
        closing = 1 if picture == pictures - 1 else 2
        pieces.append((torch.arange(closing) + at).expand(3, -1))
        at += closing
    prefix = sum(p.shape[1] for p in pieces)
    pieces += [(torch.arange(length) + at).repeat(count).expand(3, -1) for count, length in groups]
    return Layout(prefix, groups, torch.cat(pieces, dim=1), torch.cat(visual))


def answer_tokens(sample: Sample) -> tuple[list[int], list[float]]:
    """Token ids of the answer with its end, and their weights."""
    ids = [*encode(sample.answer), *encode(END)]
    if sample.task not in ("grounding", "list", "point"):
        word = LETTER_WEIGHT if sample.task == "mcq" else CLIP_WEIGHT if sample.category == "clip" else WORD_WEIGHT
        return ids, [word] * (len(ids) - 1) + [MARK_WEIGHT]
    known = set(coordinate_ids())
    weights = [COORDINATE_WEIGHT if token in known else MARK_WEIGHT for token in ids]
    for place, (before, token) in enumerate(pairwise(ids), start=1):
        if token in known and before not in encode(", "):
            weights[place] = FIRST_WEIGHT
    return ids, weights


def pack(asked: Sequence[Sequence[Sample]], groups: Groups) -> tuple[list[int], list[int], list[float]]:
    """Place questions in the groups of slots: (ids, labels, weights) over all slot tokens.

    A list that is longer than its slot is cut there; it still teaches what it holds.

    Raises:
        ValueError: if another question does not fit its slot, or there are more questions than slots.
    """
    pad = encode("<|endoftext|>")[0]
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for (count, length), samples in zip(groups, asked, strict=True):
        if len(samples) > count:
            raise ValueError(f"{len(samples)} questions for {count} slots of {length} tokens")
        for slot in range(count):
            row, row_labels, row_weights = [pad] * length, [IGNORED] * length, [0.0] * length
            if slot < len(samples):
                sample = samples[slot]
                question = [*encode(tasks.prompt_of(sample)), *encode(BEFORE_ANSWER)]
                answer, answer_weights = answer_tokens(sample)
                used = len(question) + len(answer) - 1
                if used > length and (sample.task != "list" or len(question) >= length):
                    raise ValueError(
                        f"{sample.question!r} with its answer takes {used} tokens and its slot has {length}; "
                        "give the group of its kind more tokens"
                    )
                used = min(used, length)
                row[:used] = [*question, *answer[:-1]][:used]
                row_labels[len(question) - 1 : used] = answer[: used - len(question) + 1]
                row_weights[len(question) - 1 : used] = answer_weights[: used - len(question) + 1]
            ids += row
            labels += row_labels
            weights += row_weights
    return ids, labels, weights
