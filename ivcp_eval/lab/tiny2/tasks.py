"""Questions about a scene, all answered in words: boxes, points, what is where, relations, lists, short answers.

The prompts are those that an evaluation run sends (``ivcp_eval.lab.tiny.tasks``), and some more that only teach. What
other models are taught by dense heads or shown by guided attention, this one has to learn from these answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ivcp_eval.lab.tiny import tasks as base
from ivcp_eval.lab.tiny.scenes import SIGN, Box
from ivcp_eval.lab.tiny.tasks import name_of
from ivcp_eval.lab.tiny2.processor import STEP
from ivcp_eval.lab.tiny2.scenes import CELL, Placed, Scene, cell_owner

LIST_PROMPT = "List all objects with their boxes."
CENSUS_PROMPT = "Count each colour and shape."
T = TypeVar("T")
#: Tasks that an evaluation asks, and those that only teach.
EVALUATED = ("grounding", "short", "yes_no", "mcq")
SHORT_CATEGORIES = ("colour", "shape", "count", "number", "texture")


@dataclass(frozen=True)
class Sample(base.Sample):
    """A question; ``picture`` counts from 1 and is 0 where the prompt holds only one."""

    picture: int = 0


def coarse(value: int) -> int:
    """The multiple of `STEP` pixels nearest to ``value``."""
    return (value + STEP // 2) // STEP * STEP


def format_box(box: Box) -> str:
    """A box as the model writes it: in the format of the first embedded model, in multiples of `STEP` pixels."""
    x1, y1, x2, y2 = (coarse(value) for value in box)
    return base.format_box((x1, y1, x2, y2))


def list_all(scene: Scene) -> Sample:
    """Every object with its box, from left to right."""
    ordered = sorted(scene.objects, key=lambda o: (o.box[0], o.box[1]))
    return Sample("list", "list", LIST_PROMPT, "\n".join(name_of(o) + format_box(o.box) for o in ordered))


def census(scene: Scene) -> Sample:
    """How many objects there are of every colour and of every shape in the picture: all its counts in one answer."""
    plain = [o for o in scene.objects if o.shape != SIGN]
    counts = [*sorted(Counter(o.colour for o in plain).items()), *sorted(Counter(o.shape for o in plain).items())]
    return Sample("census", "census", CENSUS_PROMPT, "\n".join(f"{name} {count}" for name, count in counts))


def groundings(scene: Scene) -> list[base.Sample]:
    """Box of every object that its name tells from the others."""
    found = base.plain_references(scene)  # type: ignore[arg-type]
    return [replace(sample, answer=format_box(sample.box)) for sample in found if sample.box]


def points(scene: Scene) -> list[Sample]:
    """Centre of the box of every object whose name is unique."""
    found = []
    for sample in base.plain_references(scene):  # type: ignore[arg-type]
        x1, y1, x2, y2 = sample.box or (0, 0, 0, 0)
        answer = f"[{coarse((x1 + x2) // 2)}, {coarse((y1 + y2) // 2)}]"
        found.append(Sample("point", "point", f"Point to the {sample.question}.", answer))
    return found


def what_is_at(rng: np.random.Generator, scene: Scene) -> Sample:
    """Inverse grounding: what lies at a point, nothing in one of five."""
    owner = cell_owner(scene)
    columns = scene.width // CELL
    inside = rng.integers(5) > 0
    cells = np.flatnonzero((owner >= 0) == inside)
    if len(cells) == 0:
        cells = np.arange(len(owner))
    cell = int(cells[rng.integers(len(cells))])
    x, y = (at * CELL + CELL // 2 for at in (cell % columns, cell // columns))
    answer = name_of(scene.objects[owner[cell]]) if owner[cell] >= 0 else "none"
    return Sample("inverse", "inverse", f"What is at [{x + scene.origin[0]}, {y + scene.origin[1]}]?", answer)


def relation(rng: np.random.Generator, scene: Scene) -> Sample | None:
    """Whether one uniquely named object stands in a relation to another, half of them so."""
    names = [name_of(o) for o in scene.objects]
    unique = [(n, o) for n, o in zip(names, scene.objects, strict=True) if names.count(n) == 1]
    if len(unique) < 2:
        return None
    (name, item), (other, anchor) = (unique[i] for i in rng.permutation(len(unique))[:2])
    asked = base.RELATIONS[rng.integers(4)]
    if base.holds(asked, item, anchor, base.RELATION_MARGIN):
        answer = "Yes"
    elif not base.holds(asked, item, anchor, -base.RELATION_MARGIN):
        answer = "No"
    else:
        return None
    return Sample("yes_no", "relation", f"Is the {name} {asked} the {other}?{base.YES_NO_SUFFIX}", answer)


def short(rng: np.random.Generator, scene: Scene, category: str) -> base.Sample | None:
    """Short-answer question of ``category``, or None if the scene offers none."""
    if category != "texture":
        return base.short_question(rng, scene, category)  # type: ignore[arg-type]
    names = [name_of(o) for o in scene.objects]
    unique = [o for n, o in zip(names, scene.objects, strict=True) if names.count(n) == 1 and o.shape != SIGN]
    if not unique:
        return None
    item: Placed = unique[rng.integers(len(unique))]
    return Sample("short", "texture", f"What texture has the {name_of(item)}?", item.texture)


def pick(rng: np.random.Generator, scene: Scene, kinds: Sequence[str]) -> list[Sample]:
    """One question for each of ``kinds`` that the scene offers, no object twice of a kind if it can be helped.

    Kinds: ``list``, ``census``, ``box``, ``point``, ``inverse``, ``relation``, ``yes_no``, ``mcq`` and the categories
    of short answers.

    Raises:
        ValueError: for an unknown kind.
    """
    boxes, centres = _shuffled(rng, groundings(scene)), _shuffled(rng, points(scene))
    found: list[base.Sample | None] = []
    for kind in kinds:
        if kind == "list":
            found.append(list_all(scene))
        elif kind == "census":
            found.append(census(scene))
        elif kind == "box":
            found.append(boxes.pop() if boxes else None)
        elif kind == "point":
            found.append(centres.pop() if centres else None)
        elif kind == "inverse":
            found.append(what_is_at(rng, scene))
        elif kind == "relation":
            found.append(relation(rng, scene))
        elif kind == "yes_no":
            found.append(base.yes_no_question(rng, scene))  # type: ignore[arg-type]
        elif kind == "mcq":
            category = base.MCQ_CATEGORIES[rng.integers(len(base.MCQ_CATEGORIES))]
            found.append(base.mcq_question(rng, scene, category))  # type: ignore[arg-type]
        elif kind in SHORT_CATEGORIES:
            found.append(short(rng, scene, kind))
        else:
            known = ("list", "census", "box", "point", "inverse", "relation", "yes_no", "mcq", *SHORT_CATEGORIES)
            raise ValueError(f"unknown kind of question {kind!r}; known: {', '.join(known)}")
    return [_own(sample) for sample in found if sample]


def _own(sample: base.Sample) -> Sample:
    return Sample(sample.task, sample.category, sample.question, sample.answer, sample.options, sample.box)


def _shuffled(rng: np.random.Generator, samples: Sequence[T]) -> list[T]:
    return [samples[i] for i in rng.permutation(len(samples))]


def prompt_of(sample: Sample) -> str:
    """The text that follows the picture in the user turn."""
    prompt = base.build_prompt(sample) if sample.task in EVALUATED else sample.question
    return f"In picture {sample.picture}: {prompt}" if sample.picture else prompt
