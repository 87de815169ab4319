"""Write the embedded 3-D benchmark ``datasets/tiny_rooms.tsv``: ``ivcp lab build-benchmarks rooms [--check]``.

Rooms of four metres with objects on the floor, seen from the four upper corners, with the exact depth of every view and
the pose of its camera (`benchmarks.geometry`), and a choice about what stands where. Answers follow from the scene.
Rays are cast with sums, products, quotients and square roots alone, which are the same everywhere, so the bytes are.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ivcp_eval.benchmarks.geometry import packed
from ivcp_eval.interface import Geometry
from ivcp_eval.lab.tiny.build_benchmarks import encode_png, one_file
from ivcp_eval.lab.tiny.scenes import COLOURS
from ivcp_eval.lab.tiny.tasks import LETTERS
from ivcp_eval.lab.tiny2.clips import FRAMES_A_STEP, SECONDS_A_STEP, SIDE
from ivcp_eval.lab.tiny2.scenes import SPLITS

NAME = "tiny_rooms.tsv"
COLUMNS = ("index", "image", "seconds", "geometry", "question", *LETTERS, "answer", "category", "image_id")
ROOMS = 16
#: Pixels along a side of a cell of the depth that is stored.
CELL = 4
FOCAL = 0.6
HALF, HEIGHT = 2.0, 2.4  # of the room, in metres
CAMERAS = ((-1.8, -1.8, 1.8), (1.8, -1.8, 1.8), (1.8, 1.8, 1.8), (-1.8, 1.8, 1.8))
AIM = (0.0, 0.0, 0.3)
#: Metres by which the nearest object, and the right distance, differ from every other choice.
MARGIN = 0.4
LEAST_PIXELS = 40  # of each object in the view that shows most of it

Vector = tuple[float, float, float]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Solid:
    """An object on the floor: a ball, or a cuboid that is as deep as it is wide.

    Attributes:
        x, y: of its middle. half: radius, or half of its width. height: in metres.
    """

    shape: Literal["ball", "box", "pillar"]
    colour: str
    x: float
    y: float
    half: float
    height: float

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"

    def apart(self, other: Solid) -> float:
        """Metres between the middles of both, along the floor."""
        dx, dy = self.x - other.x, self.y - other.y
        return float(np.sqrt(dx * dx + dy * dy))

    def hit(self, origin: Vector, rays: tuple[Numbers, Numbers, Numbers]) -> tuple[Numbers, NDArray[np.int64]]:
        """How far along each ray it is met, infinite where it is not, and which side of it: 0, 1 or 2."""
        if self.shape == "ball":
            return _hit_ball(origin, rays, (self.x, self.y, self.half), self.half)
        low = (self.x - self.half, self.y - self.half, 0.0)
        return _hit_cuboid(origin, rays, low, (self.x + self.half, self.y + self.half, self.height))


@dataclass(frozen=True)
class View:
    """One picture (112, 112, 3) with its depth, and how many pixels show each object."""

    picture: NDArray[np.uint8]
    geometry: Geometry
    pixels: tuple[int, ...]


def pose_of(camera: Vector) -> Numbers:
    """(3, 4) camera to world of one that looks from ``camera`` at the room's middle; x right, y down, z forward."""
    forward = _unit((AIM[0] - camera[0], AIM[1] - camera[1], AIM[2] - camera[2]))
    right = _unit((forward[1], -forward[0], 0.0))
    down = (
        forward[1] * right[2] - forward[2] * right[1],
        forward[2] * right[0] - forward[0] * right[2],
        forward[0] * right[1] - forward[1] * right[0],
    )
    return np.stack([np.array(axis) for axis in (right, down, forward, camera)], axis=1)


def rendered(solids: tuple[Solid, ...], camera: Vector) -> View:
    """What one camera sees."""
    pose = pose_of(camera)
    shades, _, which = _cast(solids, camera, pose, SIDE)
    _, depth, _ = _cast(solids, camera, pose, SIDE // CELL)
    geometry = Geometry(depth.astype(np.float32), pose, (FOCAL, FOCAL))
    return View(shades, geometry, tuple(int((which == number).sum()) for number in range(len(solids))))


def _cast(
    solids: tuple[Solid, ...], camera: Vector, pose: Numbers, side: int
) -> tuple[NDArray[np.uint8], Numbers, NDArray[np.int64]]:
    """Colours (side, side, 3), depths and numbers of what the rays through the middles of ``side`` cells meet."""
    offsets = ((np.arange(side) + 0.5) / side - 0.5) / FOCAL
    across, down = offsets[None, :].repeat(side, 0), offsets[:, None].repeat(side, 1)
    # Of length 1 along the camera's axis, so that how far along a ray is depth.
    x, y, z = (pose[axis, 0] * across + pose[axis, 1] * down + pose[axis, 2] for axis in range(3))
    rays = (x, y, z)
    room = _inside_room(camera, rays)
    hits = [room, *(solid.hit(camera, rays) for solid in solids)]
    distance = np.stack([hit for hit, _ in hits])
    nearest = distance.argmin(axis=0)
    depth = np.take_along_axis(distance, nearest[None], 0)[0]
    face = np.take_along_axis(np.stack([face for _, face in hits]), nearest[None], 0)[0]
    tones = np.array([(226, 220, 208), *(COLOURS[solid.colour] for solid in solids)], dtype=np.int64)
    shade = np.array([7, 8, 10], dtype=np.int64)[face]
    colours = (tones[nearest] * shade[..., None] // 10).astype(np.uint8)
    return colours, depth, nearest - 1


def _inside_room(origin: Vector, rays: tuple[Numbers, Numbers, Numbers]) -> tuple[Numbers, NDArray[np.int64]]:
    found = []
    for start, ray, (low, high) in zip(origin, rays, ((-HALF, HALF), (-HALF, HALF), (0.0, HEIGHT)), strict=True):
        safe = np.where(ray == 0, 1.0, ray)
        wall = (np.where(ray > 0, high, low) - start) / safe
        found.append(np.where(ray == 0, np.inf, wall))
    walls = np.stack(found)
    return walls.min(axis=0), walls.argmin(axis=0)


def _hit_cuboid(
    origin: Vector, rays: tuple[Numbers, Numbers, Numbers], low: Vector, high: Vector
) -> tuple[Numbers, NDArray[np.int64]]:
    enters, leaves = [], []
    for start, ray, a, b in zip(origin, rays, low, high, strict=True):
        safe = np.where(ray == 0, 1e-300, ray)
        one, other = (a - start) / safe, (b - start) / safe
        enters.append(np.minimum(one, other))
        leaves.append(np.maximum(one, other))
    enter, leave = np.stack(enters), np.stack(leaves).min(axis=0)
    first = enter.max(axis=0)
    return np.where((first < leave) & (first > 0), first, np.inf), enter.argmax(axis=0)


def _hit_ball(
    origin: Vector, rays: tuple[Numbers, Numbers, Numbers], middle: Vector, radius: float
) -> tuple[Numbers, NDArray[np.int64]]:
    to = [start - centre for start, centre in zip(origin, middle, strict=True)]
    a = rays[0] * rays[0] + rays[1] * rays[1] + rays[2] * rays[2]
    b = rays[0] * to[0] + rays[1] * to[1] + rays[2] * to[2]
    c = to[0] * to[0] + to[1] * to[1] + to[2] * to[2] - radius * radius
    under = b * b - a * c
    distance = (-b - np.sqrt(np.where(under > 0, under, 0.0))) / a
    hit = (under > 0) & (distance > 0)
    top = to[2] + distance * rays[2]  # lighter above
    face = np.where(top > radius / 2, 2, np.where(top > -radius / 4, 1, 0))
    return np.where(hit, distance, np.inf), face.astype(np.int64)


def _unit(vector: Vector) -> Vector:
    length = float(np.sqrt(vector[0] * vector[0] + vector[1] * vector[1] + vector[2] * vector[2]))
    return vector[0] / length, vector[1] / length, vector[2] / length


def furnished(rng: np.random.Generator, count: int) -> tuple[Solid, ...]:
    """``count`` objects of different colours that do not touch."""
    colours = rng.permutation(list(COLOURS))[:count].tolist()
    made: list[Solid] = []
    while len(made) < count:
        shape = ("ball", "box", "pillar")[int(rng.integers(3))]
        half = int(rng.integers(15, 26)) / 100
        x, y = (int(number) / 100 for number in rng.integers(-150, 151, 2))
        height = {"ball": 2 * half, "box": 2 * half, "pillar": 1.2}[shape]
        solid = Solid(shape, colours[len(made)], x, y, half, height)  # type: ignore[arg-type] # one of its shapes
        clear = all(abs(solid.x - c[0]) + abs(solid.y - c[1]) > 1 for c in CAMERAS)
        if clear and all(solid.apart(other) > 0.6 for other in made):
            made.append(solid)
    return tuple(made)


Asked = tuple[str, list[str], str]
"""A question, its choices, and the right one."""


def nearest(rng: np.random.Generator, solids: tuple[Solid, ...]) -> Asked | None:
    """Which of the others is nearest to one."""
    for number in rng.permutation(len(solids)).tolist():
        one, rest = solids[number], [solid for solid in solids if solid is not solids[number]]
        distances = sorted(one.apart(other) for other in rest)
        if distances[1] - distances[0] >= MARGIN:
            right = min(rest, key=one.apart)
            wrong = [rest[i] for i in rng.permutation(len(rest)).tolist() if rest[i] is not right][:2]
            choices = [str(right), *map(str, wrong)]
            return f"Which object stands nearest to the {one}?", choices, str(right)
    return None


def count(rng: np.random.Generator, solids: tuple[Solid, ...]) -> Asked | None:
    """How many objects there are."""
    del rng
    return "How many objects stand in the room?", ["3", "4", "5", "6"], str(len(solids))


def distance(rng: np.random.Generator, solids: tuple[Solid, ...]) -> Asked | None:
    """How far apart the middles of two are: the nearest of four choices, and near to it."""
    choices = (0.7, 1.5, 2.3, 3.1)
    pairs = list(combinations(solids, 2))
    for number in rng.permutation(len(pairs)).tolist():
        one, other = pairs[number]
        right = min(choices, key=lambda metres: abs(metres - one.apart(other)))
        if abs(right - one.apart(other)) <= (choices[1] - choices[0]) / 2 - MARGIN / 4:
            question = f"About how far apart are the {one} and the {other}?"
            return question, [f"{metres:g} metres" for metres in choices], f"{right:g} metres"
    return None


TASKS: dict[str, Callable[[np.random.Generator, tuple[Solid, ...]], Asked | None]] = {
    "nearest": nearest,
    "count": count,
    "distance": distance,
}


def room(split: str, number: int) -> tuple[tuple[Solid, ...], tuple[View, ...], dict[str, Asked], np.random.Generator]:
    """The objects of a room, its views, a question of each kind, and the generator that goes on; always the same.

    Every object shows in some view, and every kind of question can be asked.
    """
    rng = np.random.Generator(np.random.PCG64([SPLITS[split], 78, number]))
    while True:
        solids = furnished(rng, 3 + number % 4)
        asked = {name: question for name, ask in TASKS.items() if (question := ask(rng, solids)) is not None}
        if len(asked) < len(TASKS):
            continue
        views = tuple(rendered(solids, camera) for camera in CAMERAS)
        if all(max(view.pixels[i] for view in views) >= LEAST_PIXELS for i in range(len(solids))):
            return solids, views, asked, rng


def content(split: str = "test") -> bytes:
    """The file: a question of each kind about every room."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    steps = range(len(CAMERAS) * FRAMES_A_STEP)
    for number in range(ROOMS):
        _, views, asked, rng = room(split, number)
        pictures = [base64.b64encode(encode_png(view.picture)).decode() for view in views]
        shown = [step // FRAMES_A_STEP for step in steps]
        for place, (category, (question, choices, right)) in enumerate(asked.items()):
            drawn = [choices[i] for i in rng.permutation(len(choices)).tolist()]
            writer.writerow(
                {
                    "index": number * len(TASKS) + place + 1,
                    "image": str([pictures[view] for view in shown]),
                    "seconds": json.dumps([SECONDS_A_STEP / FRAMES_A_STEP * step for step in steps]),
                    "geometry": packed([view.geometry for view in views], shown),
                    "question": question,
                    **dict(zip(LETTERS, drawn, strict=False)),
                    "answer": LETTERS[drawn.index(right)],
                    "category": category,
                    "image_id": f"{split}_room_{number}",
                }
            )
    return text.getvalue().encode()


def main(arguments: list[str] | None = None) -> int:
    """Command line: write the file, or compare it with what would be written."""
    return one_file("ivcp lab build-benchmarks rooms", __doc__ or "", NAME, content, arguments)
