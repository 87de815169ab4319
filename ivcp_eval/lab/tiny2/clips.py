"""Write the embedded video benchmark ``datasets/tiny_clips.tsv``: ``ivcp lab build-benchmarks clips [--check]``.

Eight pictures of the second embedded model's objects, half a second of each, and a choice about what happens. Clips
come in groups that share one question and its options, and are made such that whoever sees a single picture of a clip,
and knows at what time it is shown, can do no better than chance: for every such picture the group has as many clips of
each answer. So whatever a model scores above chance, it has from several pictures. A test counts this in the file.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product, zip_longest

import numpy as np
from numpy.typing import NDArray

from ivcp_eval.lab.tiny.build_benchmarks import encode_png, one_file
from ivcp_eval.lab.tiny.scenes import COLOURS, Box
from ivcp_eval.lab.tiny.tasks import LETTERS
from ivcp_eval.lab.tiny2.scenes import SHAPES, SPLITS, Placed, Scene, render
from ivcp_eval.lab.tiny2.tasks import Sample

NAME = "tiny_clips.tsv"
SIDE = 112  # pixels of a picture, both ways
THING = 28  # of an object
STEPS = 8
SECONDS_A_STEP = 0.5
#: Frames of each picture. An encoder that makes one token of two frames never joins two pictures then.
FRAMES_A_STEP = 2
COLUMNS = ("index", "image", "seconds", "question", *LETTERS, "answer", "category", "image_id")

Frame = tuple[Placed, ...]


@dataclass(frozen=True)
class Clip:
    """One question: the objects of every picture, from the bottom to the top, and the option that is right."""

    frames: tuple[Frame, ...]
    answer: int


@dataclass(frozen=True)
class Group:
    """Clips with one question. See the module's docstring for what holds of them."""

    question: str
    options: tuple[str, ...]
    clips: tuple[Clip, ...]


def direction(rng: np.random.Generator, variant: int) -> Group:
    """Left or right (up or down): from every start, round and round."""
    (thing,) = _things(rng, 1)
    words = ("left", "right") if variant % 2 == 0 else ("up", "down")
    stride = (SIDE - THING) // (STEPS - 1)

    def at(place: int) -> Frame:
        way = stride * (place % STEPS)
        return (thing.at(*((way, 42) if variant % 2 == 0 else (42, way))),)

    clips = (
        Clip(tuple(at(start + sign * step) for step in range(STEPS)), answer)
        for start in range(STEPS)
        for answer, sign in enumerate((-1, 1))
    )
    question = f"The {thing} leaves the picture on one side and comes back on the other. Which way does it move?"
    return Group(question, words, tuple(clips))


def order(rng: np.random.Generator, variant: int) -> Group:
    """Four objects take turns, twice; in every order, beginning with any of them."""
    del variant
    things = _things(rng, 4)
    clips = []
    for rest in permutations(range(1, 4)):
        turn = (0, *rest)
        for phase in range(4):
            frames = tuple((things[turn[(phase + step) % 4]].at(42, 42),) for step in range(STEPS))
            clips.append(Clip(frames, rest[0] - 1))
    options = tuple(map(str, things[1:]))
    return Group(f"The objects take turns. Which one is shown right after the {things[0]}?", options, tuple(clips))


def first_move(rng: np.random.Generator, variant: int) -> Group:
    """Two objects move once each, from wherever they stood."""
    things = _things(rng, 2)
    times = ((2, 5), (3, 6), (1, 4), (2, 4))[variant % 4]

    def frame(step: int, homes: tuple[int, int], first: int) -> Frame:
        moved = (step >= times[first], step >= times[1 - first])
        return tuple(
            thing.at(14 + 56 * column, 70 if home != gone else 14)
            for column, (thing, home, gone) in enumerate(zip(things, homes, moved, strict=True))
        )

    clips = (
        Clip(tuple(frame(step, homes, first) for step in range(STEPS)), first)
        for homes in ((0, 0), (0, 1), (1, 0), (1, 1))
        for first in (0, 1)
    )
    return Group("Both objects move once. Which one moves first?", tuple(map(str, things)), tuple(clips))


def entering(rng: np.random.Generator, variant: int) -> Group:
    """One to three come through a door, each for some pictures; every picture shows one in half of the clips."""
    (thing,) = _things(rng, 1)
    door = _Thing("square", "door", (90, 70, 60))
    two = ("110100", "100110")[variant % 2]
    clips = []
    for answer, shown in enumerate(("111000", two, "101010")):
        for there in ("1", "0"):  # and its complement, in which as many come in
            frames = [(door.at(0, 42), thing.at(20, 42)) if mark == there else (door.at(0, 42),) for mark in shown]
            clips.append(Clip(((door.at(0, 42),), *frames, (door.at(0, 42),)), answer))
    question = f"One {thing} after another comes through the door and is gone again. How many come in?"
    return Group(question, ("1", "2", "3"), tuple(clips))


def box_before(rng: np.random.Generator, variant: int) -> Group:
    """Where an object was half a second before another was shown: it is once in every place."""
    del variant
    thing, sign = _things(rng, 2)
    places = [(10, 10), (74, 10), (10, 74), (74, 74)]
    clips = []
    for start, shown in product(range(4), repeat=2):
        turn = [(start + step) % 4 for step in range(4)]
        frames: list[Frame] = []
        for step, place in enumerate(turn):
            frames += [(thing.at(*places[place]),), (sign.at(42, 42),) if step == shown else ()]
        clips.append(Clip(tuple(frames), turn[shown]))
    boxes = tuple(str([x, y, x + THING, y + THING]) for x, y in places)
    return Group(f"Which box holds the {thing} half a second before the {sign} is shown?", boxes, tuple(clips))


def covered(rng: np.random.Generator, variant: int) -> Group:
    """Two objects are covered; then the covers change places, with what is under them, or not."""
    del variant
    things = _things(rng, 2)
    covers = [_Thing("square", "cover", tone, 36) for tone in ((60, 60, 60), (150, 150, 150))]
    clips = []
    for left, dark, swap in product((0, 1), repeat=3):
        columns = (10, 66)

        def hidden(at: int) -> Frame:
            return covers[0].at(columns[at], 62), covers[1].at(columns[1 - at], 62)  # noqa: B023 (called at once)

        seen = (
            *(things[left if column == 0 else 1 - left].at(4 + x, 66) for column, x in enumerate(columns)),
            *(covers[i].at(columns[dark if i == 0 else 1 - dark], 8) for i in (0, 1)),
        )
        between = (covers[0].at(38, 70), covers[1].at(38, 34)) if swap else hidden(dark)
        end = hidden(dark ^ swap)
        frames = (seen, seen, hidden(dark), hidden(dark), between, between, end, end)
        clips.append(Clip(frames, left ^ swap))
    question = "The two covers may change places, each with what is under it. What is under the left one at the end?"
    return Group(question, tuple(map(str, things)), tuple(clips))


#: Category -> how its groups are made, and how many there are.
TASKS: dict[str, tuple[Callable[[np.random.Generator, int], Group], int]] = {
    "direction": (direction, 2),
    "order": (order, 2),
    "first_move": (first_move, 4),
    "entering": (entering, 6),
    "box_before": (box_before, 2),
    "covered": (covered, 4),
}


@dataclass(frozen=True)
class _Thing:
    """What can be put somewhere."""

    shape: str
    colour: str
    tone: tuple[int, int, int]
    side: int = THING

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    def at(self, x: int, y: int) -> Placed:
        """With its left upper corner there, in pixels."""
        box: Box = (x, y, x + self.side, y + self.side)
        return Placed(self.shape, self.colour, "solid", box, (self.tone, self.tone), frame=box)


def _things(rng: np.random.Generator, count: int) -> list[_Thing]:
    """Objects of different colours and shapes."""
    colours, shapes = rng.permutation(list(COLOURS))[:count].tolist(), rng.permutation(list(SHAPES))[:count].tolist()
    return [_Thing(shape, colour, COLOURS[colour]) for colour, shape in zip(colours, shapes, strict=True)]


def groups(split: str = "test") -> Iterator[tuple[str, int, Group, NDArray[np.int64]]]:
    """(category, number within it, the group, its clips in a drawn order, RGB of its background); always the same."""
    for task, (category, (make, count)) in enumerate(TASKS.items()):
        for variant in range(count):
            rng = np.random.Generator(np.random.PCG64([SPLITS[split], 77, task, variant]))
            group, background = make(rng, variant), rng.integers(200, 246, 3)
            drawn = tuple(group.clips[i] for i in rng.permutation(len(group.clips)))
            yield category, variant, replace(group, clips=drawn), background


def draw(rng: np.random.Generator, categories: Sequence[str]) -> tuple[Group, Clip, NDArray[np.uint8]]:
    """A clip of one of ``categories``: its group, the clip, and its pictures (steps, height, width, 3)."""
    make, variants = TASKS[categories[int(rng.integers(len(categories)))]]
    group = make(rng, int(rng.integers(variants)))
    clip, background = group.clips[rng.integers(len(group.clips))], rng.integers(200, 246, 3)
    return group, clip, np.stack([picture(frame, background) for frame in clip.frames])


def choice(rng: np.random.Generator, group: Group, clip: Clip) -> Sample:
    """The question of ``group`` about ``clip``, its options in a drawn order."""
    order = rng.permutation(len(group.options)).tolist()
    options = tuple(group.options[i] for i in order)
    return Sample("mcq", "clip", group.question, LETTERS[order.index(clip.answer)], options)


def picture(frame: Frame, background: NDArray[np.int64]) -> NDArray[np.uint8]:
    """One picture (112, 112, 3)."""
    red, green, blue = background.tolist()
    tone = red, green, blue
    return render(Scene(SIDE, SIDE, (tone, tone, "solid", 8), (), frame, np.empty((0, 0), dtype=np.int8)))


def content(split: str = "test") -> bytes:
    """The file: categories in turn, so that its first rows hold all of them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    seconds = json.dumps([SECONDS_A_STEP / FRAMES_A_STEP * frame for frame in range(FRAMES_A_STEP * STEPS)])
    rows: dict[str, list[dict[str, str]]] = {category: [] for category in TASKS}
    for category, variant, group, background in groups(split):
        drawn: dict[Frame, str] = {}
        for clip in group.clips:
            for frame in clip.frames:
                if frame not in drawn:
                    drawn[frame] = base64.b64encode(encode_png(picture(frame, background))).decode()
            rows[category].append(
                {
                    "image": str([drawn[frame] for frame in clip.frames for _ in range(FRAMES_A_STEP)]),
                    "seconds": seconds,
                    "question": group.question,
                    **dict(zip(LETTERS, group.options, strict=False)),
                    "answer": LETTERS[clip.answer],
                    "category": category,
                    "image_id": f"{split}_{category}_{variant}",
                }
            )
    in_turn = [row for several in zip_longest(*rows.values()) for row in several if row is not None]
    writer.writerows({"index": index, **row} for index, row in enumerate(in_turn, start=1))
    return text.getvalue().encode()


def main(arguments: list[str] | None = None) -> int:
    """Command line: write the file, or compare it with what would be written."""
    return one_file("ivcp lab build-benchmarks clips", __doc__ or "", NAME, content, arguments)
