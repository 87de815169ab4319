"""Training batches: scenes of one size, questions packed into slots, dense targets for every image cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivcp_eval.lab.tiny import tasks
from ivcp_eval.lab.tiny.processor import CELL, SYSTEM_PROMPT
from ivcp_eval.lab.tiny.scenes import COLOURS, SHAPES, SIGN, Scene, render, sample_scene, scene_rng
from ivcp_eval.lab.tiny.training.fast import TextLayout, text_layout
from ivcp_eval.lab.tiny.vocabulary import build_tokenizer

BEFORE_IMAGE = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER_IMAGE = "<|vision_end|>"
BEFORE_ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
#: (questions, tokens) of the three groups of slots: boxes; multiple choice; yes/no and short answers.
SLOTS = ((3, 33), (1, 37), (5, 18))
#: Total weight of one answer by task (or category), whatever its number of tokens; the slow learners weigh more.
ANSWER_WEIGHTS = {"grounding": 3.0, "mcq": 2.0, "yes_no": 1.5, "short": 1.0, "count": 2.5}
SHAPE_CLASSES = ("background", *SHAPES, SIGN)
COLOUR_CLASSES = ("background", *COLOURS, "white")
IGNORED = -100


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The tiny tokenizer, built once."""
    return build_tokenizer()


@lru_cache(maxsize=100_000)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of ``text``."""
    return tuple(tokenizer().encode(text).ids)


@dataclass
class Batch:
    """One training batch of equal-sized images.

    Attributes:
        images: (batch, height, width, 3) uint8.
        ids: (batch, tokens) int64, the image tokens included.
        labels: (batch, slot tokens) next token of every slot token, or -100.
        weights: (batch, slot tokens) weight of each label.
        shape, colour: (batch, cells) classes of the object under each cell, 0 for background.
        boxes: (batch, cells, 4) box in pixels of the object under the cell (0 where none).
        digits: (batch, cells, 2) digits of the sign under the cell, -100 elsewhere.
        looked_at: (batch, questions, 1 + cells) where to look for an answer: the cells of the object asked
            about, or the token before the image (first) if it is absent; all zero for counting.
        option: (batch, slot tokens) true on the text of the right option of a multiple-choice question.
        counted: (batch, questions, 1 + cells) how to spread attention for counting: evenly over the token before
            the image and the centre cell of every object counted; all zero for other questions.
        layout: layout of the sequence.
    """

    images: Tensor
    ids: Tensor
    labels: Tensor
    weights: Tensor
    shape: Tensor
    colour: Tensor
    boxes: Tensor
    digits: Tensor
    looked_at: Tensor
    option: Tensor
    counted: Tensor
    layout: TextLayout


@lru_cache(maxsize=64)
def layout_for(width: int, height: int, slots: tuple[tuple[int, int], ...] = SLOTS) -> TextLayout:
    """Layout of a training sequence for images of ``width`` x ``height`` pixels."""
    return text_layout(len(encode(BEFORE_IMAGE)), height // CELL, width // CELL, len(encode(AFTER_IMAGE)), slots)


def prefix_ids(width: int, height: int) -> list[int]:
    """Token ids of everything before the question."""
    cells = (width // CELL) * (height // CELL)
    return [*encode(BEFORE_IMAGE), *encode("<|image_pad|>") * cells, *encode(AFTER_IMAGE)]


def make_batch(split: str, first: int, count: int, size: tuple[int, int], objects: tuple[int, int]) -> Batch:
    """Build a batch from the scenes ``first`` .. ``first + count - 1`` of ``split``."""
    scenes, rows, chosen = [], [], []
    for index in range(first, first + count):
        rng = scene_rng(split, index)
        scene = sample_scene(rng, size, objects)
        scenes.append(scene)
        groups = choose_questions(rng, scene)
        rows.append(pack(*groups, salt=index))
        chosen.append(groups)
    prefix = prefix_ids(*size)
    cells = [cell_targets(scene) for scene in scenes]
    looks = [look_targets(*pair) for pair in zip(scenes, chosen, strict=True)]
    return Batch(
        images=torch.from_numpy(np.stack([render(scene) for scene in scenes])),
        ids=torch.tensor([prefix + row[0] for row in rows]),
        labels=torch.tensor([row[1] for row in rows]),
        weights=torch.tensor([row[2] for row in rows]),
        shape=torch.from_numpy(np.stack([c[0] for c in cells])),
        colour=torch.from_numpy(np.stack([c[1] for c in cells])),
        boxes=torch.from_numpy(np.stack([c[2] for c in cells])),
        digits=torch.from_numpy(np.stack([c[3] for c in cells])),
        looked_at=torch.from_numpy(np.stack([look[0] for look in looks])),
        option=torch.tensor([row[3] for row in rows]),
        counted=torch.from_numpy(np.stack([look[1] for look in looks])),
        layout=layout_for(*size),
    )


def choose_questions(rng: np.random.Generator, scene: Scene) -> tuple[list[tasks.Sample], ...]:
    """Pick questions for each group of slots of one scene; fewer than slots if the scene offers fewer."""
    plain, related = tasks.plain_references(scene), tasks.relation_references(scene)
    boxes = [related[i] for i in rng.permutation(len(related))[:2]]
    boxes += [plain[i] for i in rng.permutation(len(plain))[: SLOTS[0][0] - len(boxes)]]
    questions = (tasks.mcq_question(rng, scene, c) for c in rng.permutation(tasks.MCQ_CATEGORIES).tolist())
    choices = [q for q in questions if q][: SLOTS[1][0]]
    short = [q for q in [tasks.yes_no_question(rng, scene)] if q]
    # Counting is learned last and so asked most.
    for category in ["count", "count", *rng.permutation(("colour", "shape", "number")).tolist()]:
        if len(short) < SLOTS[2][0] and (q := tasks.short_question(rng, scene, category)):
            short.append(q)
    return boxes, choices, short


def varied_prompt(salt: int, sample: tasks.Sample) -> str:
    """Prompt of ``sample`` with the harmless variations seen in practice, chosen by ``salt``.

    ``salt`` must not depend on the answer: the model would read the answer off the variation.
    """
    prompt = tasks.build_prompt(sample)
    if sample.task == "grounding":
        if salt % 5 == 0:
            return "\n" + prompt
        if salt % 5 == 1:
            return prompt.replace("Locate ", "Locate the ", 1)
    if sample.task == "mcq" and salt % 3 == 0:
        return prompt.rstrip()
    return prompt


def answer_tokens(sample: tasks.Sample) -> tuple[list[int], list[float]]:
    """Token ids of the answer and their weights: equal per answer, not per token, and digits before brackets."""
    ids = list(encode(sample.answer))
    whole = ANSWER_WEIGHTS.get(sample.category, ANSWER_WEIGHTS[sample.task])
    if sample.task != "grounding":
        return [*ids, *encode(END)], [whole / len(ids)] * len(ids) + [0.1]
    weights = [0.1]
    for value in sample.box or ():
        # The units are noise below the resolution that IoU 0.5 asks for.
        digits = len(str(value))
        weights += [1.0] * (digits - 1) + [0.4 if digits > 1 else 1.0, 0.1]
    total = sum(weights)
    return [*ids, *encode(END)], [whole * w / total for w in weights] + [0.1]


def pack(*groups: Sequence[tasks.Sample], salt: int = 0) -> tuple[list[int], list[int], list[float], list[bool]]:
    """Place questions in the groups of slots: (ids, labels, weights, right option) over all slot tokens.

    Raises:
        ValueError: if a question does not fit its slot or there are more questions than slots.
    """
    pad = encode("<|endoftext|>")[0]
    ids: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    option: list[bool] = []
    for (count, length), samples in zip(SLOTS, groups, strict=True):
        if len(samples) > count:
            raise ValueError(f"{len(samples)} questions for {count} slots of {length} tokens")
        for slot in range(count):
            row, row_labels, row_weights = [pad] * length, [IGNORED] * length, [0.0] * length
            row_option = [False] * length
            if slot < len(samples):
                sample = samples[slot]
                question = encode(varied_prompt(salt + slot, sample) + BEFORE_ANSWER)
                answer, answer_weights = answer_tokens(sample)
                used = len(question) + len(answer) - 1
                if used > length:
                    raise ValueError(f"question of {used} tokens in a slot of {length}: {sample.question!r}")
                row[:used] = [*question, *answer[:-1]]
                row_labels[len(question) - 1 : used] = answer
                row_weights[len(question) - 1 : used] = answer_weights
                for place in option_tokens(question, sample):
                    row_option[place] = True
            ids += row
            labels += row_labels
            weights += row_weights
            option += row_option
    return ids, labels, weights, option


def option_tokens(question: Sequence[int], sample: tasks.Sample) -> range:
    """Positions in ``question`` of the right option's text (empty unless multiple choice)."""
    if sample.task != "mcq":
        return range(0)
    line_ends = {encode("\n")[0], encode("Options:\n")[0]}
    letter = encode(sample.answer)[0]
    start = next(i for i in range(1, len(question)) if question[i] == letter and question[i - 1] in line_ends)
    end = next(i for i in range(start, len(question)) if question[i] in line_ends)
    # The letter and its full stop are not the text.
    return range(start + 2, end)


def subjects(scene: Scene, sample: tasks.Sample) -> list[int]:
    """Indices of the objects that ``sample`` is about (none if it asks for something absent)."""
    objects = list(enumerate(scene.objects))
    if sample.box:
        return [i for i, o in objects if o.box == sample.box]
    if sample.category == "number":
        return [i for i, o in objects if o.shape == SIGN]
    if sample.category in ("present", "presence"):
        text = sample.options[tasks.LETTERS.index(sample.answer)] if sample.options else sample.question
        return [i for i, o in objects if tasks.name_of(o) in text]
    if sample.answer == "No":
        return []
    return [i for i, o in objects if f" {o.shape}" in sample.question or f" {o.colour} " in sample.question]


def look_targets(
    scene: Scene, groups: Sequence[Sequence[tasks.Sample]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return ``Batch.looked_at`` and ``Batch.counted`` of one scene, each (questions, 1 + cells) float32."""
    owner, columns = cell_owner(scene), scene.width // CELL
    looked = np.zeros((sum(count for count, _ in SLOTS), 1 + owner.size), dtype=np.float32)
    counted = np.zeros_like(looked)
    start = 0
    for (count, _), samples in zip(SLOTS, groups, strict=True):
        for slot, sample in enumerate(samples):
            targets = subjects(scene, sample)
            if sample.category == "count":
                centres = [scene.objects[i].centre for i in targets]
                places = [0, *(1 + int(y) // CELL * columns + int(x) // CELL for x, y in centres)]
                counted[start + slot, places] = 1 / len(places)
            elif targets:
                looked[start + slot, 1:] = np.isin(owner, targets)
            else:
                looked[start + slot, 0] = 1
        start += count
    return looked, counted


def cell_owner(scene: Scene) -> np.ndarray[Any, Any]:
    """Return (cells,) the index of the object under each cell, -1 for background.

    A cell belongs to the object whose box covers most of it, if that is at least a fifth of the cell.
    """
    columns, rows = scene.width // CELL, scene.height // CELL
    best = np.full((rows, columns), 0.2 * CELL * CELL)
    owner = np.full((rows, columns), -1)
    left, top = np.arange(columns) * CELL, np.arange(rows) * CELL
    for index, item in enumerate(scene.objects):
        x1, y1, x2, y2 = item.box
        overlap_x = np.clip(np.minimum(left + CELL, x2) - np.maximum(left, x1), 0, CELL)
        overlap_y = np.clip(np.minimum(top + CELL, y2) - np.maximum(top, y1), 0, CELL)
        overlap = overlap_y[:, None] * overlap_x[None, :]
        owner[overlap > best] = index
        best = np.maximum(best, overlap)
    return owner.ravel()


def cell_targets(
    scene: Scene,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Dense targets of one scene: shape and colour class, box and sign digits of the object under each cell."""
    flat = cell_owner(scene)
    shape = np.array([*(SHAPE_CLASSES.index(o.shape) for o in scene.objects), 0])
    colour = np.array([*(COLOUR_CLASSES.index(o.colour) for o in scene.objects), 0])
    boxes = np.array([*(o.box for o in scene.objects), (0, 0, 0, 0)])
    digits = np.array([*([int(d) for d in o.number] or [IGNORED] * 2 for o in scene.objects), [IGNORED] * 2])
    return shape[flat], colour[flat], boxes[flat], digits[flat]
