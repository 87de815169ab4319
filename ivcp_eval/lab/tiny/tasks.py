"""Questions about a scene, in the prompt formats of the benchmarks they imitate.

The prompts are those a VLMEvalKit run sends: the Qwen2.5-VL grounding prompt, ``ImageMCQDataset.build_prompt``,
the bare question of a yes/no set, and ``ImageVQADataset.build_prompt``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ivcp_eval.lab.tiny.scenes import COLOURS, SHAPES, SIGN, Box, Scene, SceneObject

TASKS = ("grounding", "mcq", "yes_no", "short")
LETTERS = ("A", "B", "C", "D")
GROUNDING_PROMPT = "Locate {question} and output the bbox coordinates in JSON format."
MCQ_SUFFIX = "Please select the correct answer from the options above. \n"
SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."
YES_NO_SUFFIX = " Please answer yes or no."
LIST_PROMPT = (
    "Name all objects in the image from left to right, separated by commas. Call them as in: red circle, blue star, "
    f"{SIGN}."
)
SUM_PROMPT = (
    f"Count the objects of each colour in the image, without the {SIGN}, in the order {', '.join(COLOURS)}, and add "
    "them up. Answer as in: 2 red makes 2, 1 blue makes 3."
)
RELATIONS = ("left of", "right of", "above", "below")
#: Pixels by which a relation must clearly hold for the target and clearly fail for every other candidate.
RELATION_MARGIN = 16


@dataclass(frozen=True)
class Sample:
    """One question: ``question`` as stored in the TSV, ``answer`` as the model should write it."""

    task: str
    category: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    box: Box | None = field(default=None)


def build_prompt(sample: Sample) -> str:
    """Return the text that follows the image in the user turn."""
    if sample.task == "grounding":
        return GROUNDING_PROMPT.format(question=sample.question)
    if sample.task == "mcq":
        options = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, sample.options, strict=False))
        return f"Question: {sample.question}\nOptions:\n{options}{MCQ_SUFFIX}"
    if sample.task == "short":
        return sample.question + SHORT_SUFFIX
    return sample.question


def format_box(box: Box) -> str:
    """Return the answer to a grounding question, pixel coordinates of the (never resized) image."""
    return '{"bbox_2d": [' + ", ".join(str(v) for v in box) + "]}"


def article(name: str) -> str:
    """Return ``name`` with its indefinite article."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def name_of(item: SceneObject) -> str:
    """Return how an object is called: ``red circle`` or ``sign``."""
    return SIGN if item.shape == SIGN else f"{item.colour} {item.shape}"


def holds(relation: str, item: SceneObject, anchor: SceneObject, margin: float) -> bool:
    """Tell whether ``item`` stands in ``relation`` to ``anchor`` by at least ``margin`` pixels (of the centres)."""
    dx, dy = item.centre[0] - anchor.centre[0], item.centre[1] - anchor.centre[1]
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation] >= margin


def list_question(scene: Scene) -> Sample | None:
    """Every object by name, from left to right; None where two middles are too close to tell their order."""
    ordered = sorted(scene.objects, key=lambda o: o.centre[0])
    gaps = [b.centre[0] - a.centre[0] for a, b in pairwise(ordered)]
    if len(ordered) < 3 or min(gaps) < RELATION_MARGIN / 2:
        return None
    return Sample("list", "order", LIST_PROMPT, ", ".join(name_of(o) for o in ordered))


def sum_question(scene: Scene) -> Sample | None:
    """Objects of each colour, added up step by step; None for fewer than two colours."""
    counts = {colour: [o.colour for o in scene.shapes].count(colour) for colour in COLOURS}
    steps, total = [], 0
    for colour, count in counts.items():
        total += count
        if count:
            steps.append(f"{count} {colour} makes {total}")
    return Sample("list", "sum", SUM_PROMPT, ", ".join(steps)) if len(steps) > 1 else None


def plain_references(scene: Scene) -> list[Sample]:
    """Grounding questions that name an object by colour and shape (or as the sign), each unambiguous."""
    names = [name_of(o) for o in scene.objects]
    return [
        Sample("grounding", "plain", name, format_box(o.box), box=o.box)
        for name, o in zip(names, scene.objects, strict=True)
        if names.count(name) == 1
    ]


def relation_references(scene: Scene) -> list[Sample]:
    """Grounding questions in which only the relation to a uniquely named object tells equals apart."""
    names = [name_of(o) for o in scene.objects]
    references = []
    for name in sorted({n for n in names if names.count(n) > 1}):
        equals = [o for n, o in zip(names, scene.objects, strict=True) if n == name]
        for anchor_name, anchor in zip(names, scene.objects, strict=True):
            if names.count(anchor_name) != 1:
                continue
            for relation in RELATIONS:
                yes = [o for o in equals if holds(relation, o, anchor, RELATION_MARGIN)]
                maybe = [o for o in equals if holds(relation, o, anchor, -RELATION_MARGIN)]
                if len(yes) == 1 and len(maybe) == 1:
                    text = f"{name} {relation} the {anchor_name}"
                    references.append(Sample("grounding", "relation", text, format_box(yes[0].box), box=yes[0].box))
    return references


def yes_no_question(rng: np.random.Generator, scene: Scene) -> Sample | None:
    """Existence, half yes, half no; two in three negatives are adversarial (colour and shape occur, but apart)."""
    present = sorted({name_of(o) for o in scene.shapes})
    if not present:
        return None
    if rng.integers(2):
        name, answer, category = present[rng.integers(len(present))], "Yes", "present"
    else:
        colours, shapes = sorted({o.colour for o in scene.shapes}), sorted({o.shape for o in scene.shapes})
        crossed = [n for n in (f"{c} {s}" for c in colours for s in shapes) if n not in present]
        absent = [n for n in (f"{c} {s}" for c in COLOURS for s in SHAPES) if n not in present]
        category = "adversarial" if crossed and rng.integers(3) else "random"
        pool = crossed if category == "adversarial" else absent
        name, answer = pool[rng.integers(len(pool))], "No"
    return Sample("yes_no", category, f"Is there {article(name)} in the image?{YES_NO_SUFFIX}", answer)


def colour_question(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """Colour of the only object of its shape: (question, answer)."""
    shapes = [o.shape for o in scene.shapes]
    unique = [o for o in scene.shapes if shapes.count(o.shape) == 1]
    if not unique:
        return None
    item = unique[rng.integers(len(unique))]
    return f"What colour is the {item.shape}?", item.colour


def shape_question(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """Shape of the only object of its colour: (question, answer)."""
    colours = [o.colour for o in scene.shapes]
    unique = [o for o in scene.shapes if colours.count(o.colour) == 1]
    if not unique:
        return None
    item = unique[rng.integers(len(unique))]
    return f"What shape is the {item.colour} object?", item.shape


def count_question(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """How many objects of one shape or of one colour (1 to 4): (question, answer)."""
    shapes = [o.shape for o in scene.shapes]
    colours = [o.colour for o in scene.shapes]
    options = [(f"How many {s}{'es' if s == 'cross' else 's'} are in the image?", shapes.count(s)) for s in set(shapes)]
    options += [(f"How many {c} objects are in the image?", colours.count(c)) for c in set(colours)]
    by_count: dict[int, list[str]] = {}
    for text, count in options:
        if count <= 4:
            by_count.setdefault(count, []).append(text)
    if not by_count:
        return None
    # First the count, then the question, so that "1" is not the answer to most of them.
    counts = sorted(by_count)
    count = counts[rng.integers(len(counts))]
    texts = sorted(by_count[count])
    return texts[rng.integers(len(texts))], str(count)


def number_question(rng: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    """The number on the sign: (question, answer)."""
    del rng
    return ("What number is written on the sign?", scene.sign.number) if scene.sign else None


_SHORT = {
    "colour": colour_question,
    "shape": shape_question,
    "count": count_question,
    "number": number_question,
}
SHORT_CATEGORIES = tuple(_SHORT)
MCQ_CATEGORIES = ("colour", "shape", "count", "presence")


def short_question(rng: np.random.Generator, scene: Scene, category: str) -> Sample | None:
    """Short-answer question of ``category``, or None if the scene offers none."""
    pair = _SHORT[category](rng, scene)
    return Sample("short", category, *pair) if pair else None


def mcq_question(rng: np.random.Generator, scene: Scene, category: str) -> Sample | None:
    """Four-option question of ``category``, or None if the scene offers none."""
    if category == "presence":
        names = sorted({name_of(o) for o in scene.shapes})
        if not names:
            return None
        question, right = "Which object is in the image?", names[rng.integers(len(names))]
        pool = [n for n in (f"{c} {s}" for c in COLOURS for s in SHAPES) if n not in names]
    else:
        pair = _SHORT[category](rng, scene)
        if pair is None:
            return None
        question, right = pair
        values = {"colour": tuple(COLOURS), "shape": SHAPES, "count": ("1", "2", "3", "4")}[category]
        pool = [v for v in values if v != right]
    wrong = [pool[i] for i in rng.permutation(len(pool))[:3]]
    place = int(rng.integers(4))
    options = (*wrong[:place], right, *wrong[place:])
    return Sample("mcq", category, question, LETTERS[place], options)
