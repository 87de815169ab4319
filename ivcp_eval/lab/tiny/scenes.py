"""Deterministic generator of the tiny model's scenes: coloured shapes, a number sign, clutter.

A scene is drawn from one seed with integer arithmetic and constant tables only (no fonts, no trigonometry, no
anti-aliasing), so the same seed gives the same pixels on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 40),
    "green": (50, 160, 70),
    "blue": (50, 85, 205),
    "yellow": (240, 210, 50),
    "purple": (140, 60, 175),
    "orange": (240, 135, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIGN = "sign"
#: (width, height) in pixels of every benchmark image: sides divisible by 28, 144 to 154 visual tokens.
SIZES = ((336, 336), (392, 308), (308, 392), (420, 280), (280, 420))
#: Seed spaces that never overlap.
SPLITS = {"train": 0, "validation": 1, "test": 2}

Box = tuple[int, int, int, int]

# Vertices of a five-pointed star stretched to [-1, 1] in both directions (rounded once, so that no platform's
# sine decides over a pixel).
_STAR = (
    (0.0, -1.0), (0.2361, -0.3090), (1.0, -0.2361), (0.3820, 0.2361), (0.6180, 1.0),
    (0.0, 0.5279), (-0.6180, 1.0), (-0.3820, 0.2361), (-1.0, -0.2361), (-0.2361, -0.3090),
)  # fmt: skip

# 5 x 7 digits, one string of seven rows each.
_DIGITS = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00010 01100",
)  # fmt: skip
GLYPHS = np.array([[[int(bit) for bit in row] for row in glyph.split()] for glyph in _DIGITS], dtype=bool)


@dataclass(frozen=True)
class SceneObject:
    """One object. ``box`` is (x1, y1, x2, y2) in pixels, right and bottom edges exclusive."""

    shape: str
    colour: str
    texture: str
    box: Box
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    number: str = ""

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the box in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """A scene of ``width`` x ``height`` pixels; ``strokes`` are clutter rectangles (box, RGB) under the objects."""

    width: int
    height: int
    background: tuple[int, int, int]
    strokes: tuple[tuple[Box, tuple[int, int, int]], ...]
    objects: tuple[SceneObject, ...]

    @property
    def shapes(self) -> tuple[SceneObject, ...]:
        """The objects without the sign."""
        return tuple(o for o in self.objects if o.shape != SIGN)

    @property
    def sign(self) -> SceneObject | None:
        """The number sign, if there is one."""
        return next((o for o in self.objects if o.shape == SIGN), None)


def scene_rng(split: str, index: int) -> np.random.Generator:
    """Return the generator of scene ``index`` of ``split`` (``train``, ``validation`` or ``test``)."""
    return np.random.Generator(np.random.PCG64([SPLITS[split], index]))


def sample_scene(
    rng: np.random.Generator,
    size: tuple[int, int] | None = None,
    objects: tuple[int, int] = (3, 8),
    sign_percent: int = 50,
) -> Scene:
    """Draw a scene.

    Args:
        rng: source of all randomness.
        size: (width, height) in pixels, one of :data:`SIZES` at random when None.
        objects: smallest and largest number of objects aimed at, the sign included; a crowded canvas may
            hold fewer, but never fewer than one.
        sign_percent: chance of a number sign.
    """
    width, height = size if size is not None else SIZES[rng.integers(len(SIZES))]
    base = int(rng.integers(150, 251))
    background = tuple(int(np.clip(base + t, 0, 255)) for t in rng.integers(-12, 13, 3))
    count = int(rng.integers(objects[0], objects[1] + 1))
    # A scene uses few colours and shapes, so that attributes repeat: counting, hard negatives, relations.
    colours = rng.permutation(list(COLOURS))[: rng.integers(2, len(COLOURS) + 1)]
    shapes = rng.permutation(list(SHAPES))[: rng.integers(2, len(SHAPES) + 1)]
    largest = min(110 if count <= 3 else 92 if count <= 5 else 78, (min(width, height) - 8) * 2 // 3)
    placed: list[SceneObject] = []
    if int(rng.integers(100)) < sign_percent:
        placed += _place_sign(rng, width, height)
    while len(placed) < count:
        side = int(rng.integers(34, largest + 1))
        shape, colour = str(rng.choice(shapes)), str(rng.choice(colours))
        stretch = int(rng.integers(80, 126)) if shape != "square" else int(rng.integers(94, 107))
        box = _free_box(rng, placed, width, height, side, min(largest, max(30, side * stretch // 100)))
        if box is None:
            break
        placed.append(_paint(rng, shape, colour, box))
    return Scene(width, height, background, _strokes(rng, width, height, base), tuple(placed))  # type: ignore[arg-type]


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw ``scene`` as uint8 RGB of shape (height, width, 3)."""
    image = np.empty((scene.height, scene.width, 3), dtype=np.uint8)
    image[:] = scene.background
    for (x1, y1, x2, y2), tone in scene.strokes:
        image[y1:y2, x1:x2] = tone
    for item in scene.objects:
        x1, y1, x2, y2 = item.box
        view = image[y1:y2, x1:x2]
        if item.shape == SIGN:
            _draw_sign(view, item)
            continue
        mask = shape_mask(item.shape, x2 - x1, y2 - y1)
        second = mask & _texture_mask(item.texture, x2 - x1, y2 - y1)
        view[mask] = item.tones[0]
        view[second] = item.tones[1]
    return image


@lru_cache(maxsize=20000)
def shape_mask(shape: str, width: int, height: int) -> NDArray[np.bool_]:
    """Return the (height, width) mask of ``shape`` filling its box."""
    u = ((2 * np.arange(width) + 1 - width) / width)[None, :]
    v = ((2 * np.arange(height) + 1 - height) / height)[:, None]
    if shape == "circle":
        return u * u + v * v <= 1
    if shape == "ring":
        return (u * u + v * v <= 1) & (u * u + v * v >= 0.34)
    if shape == "square":
        return np.ones((height, width), dtype=bool)
    if shape == "triangle":
        return np.abs(u) <= (v + 1) / 2
    if shape == "cross":
        return (np.abs(u) <= 0.34) | (np.abs(v) <= 0.34)
    if shape == "star":
        return _polygon_mask(u, v)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _polygon_mask(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside = np.zeros((v.shape[0], u.shape[1]), dtype=bool)
    for (ax, ay), (bx, by) in zip(_STAR, _STAR[1:] + _STAR[:1], strict=True):
        crosses = (ay > v) != (by > v)
        slope = (bx - ax) / (by - ay) if by != ay else 0.0
        inside ^= crosses & (u < (v - ay) * slope + ax)
    return inside


@lru_cache(maxsize=20000)
def _texture_mask(texture: str, width: int, height: int) -> NDArray[np.bool_]:
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    if texture == "solid":
        return np.zeros((height, width), dtype=bool)
    if texture == "dotted":
        return ((x % 9 - 4) ** 2 + (y % 9 - 4) ** 2) <= 5
    stripes = {"horizontal": y + 0 * x, "vertical": x + 0 * y, "diagonal": x + y}[texture]
    return stripes % 10 >= 6


def _paint(rng: np.random.Generator, shape: str, colour: str, box: Box) -> SceneObject:
    texture = ("solid", "solid", "dotted", "horizontal", "vertical", "diagonal")[rng.integers(6)]
    tone = np.clip(np.array(COLOURS[colour]) + rng.integers(-15, 16, 3), 0, 255)
    # The second tone is the first one darkened or lightened by 30 %, so the hue still names the object.
    second = tone * 7 // 10 if rng.integers(2) else (tone * 7 + 255 * 3) // 10
    first_tone, second_tone = (tuple(int(c) for c in t) for t in (tone, second))
    return SceneObject(shape, colour, texture, box, (first_tone, second_tone))  # type: ignore[arg-type]


def _place_sign(rng: np.random.Generator, width: int, height: int) -> list[SceneObject]:
    number = str(rng.integers(10, 100))
    scale = int(rng.integers(4, 7))
    box = _free_box(rng, [], width, height, 15 * scale, 11 * scale)
    dark, light = int(rng.integers(0, 50)), int(rng.integers(235, 256))
    tones = ((light, light, light), (dark, dark, dark))
    return [SceneObject(SIGN, "white", "solid", box, tones, number)] if box else []


def _draw_sign(view: NDArray[np.uint8], item: SceneObject) -> None:
    """Light plate, dark frame, two digits of 5 x 7 blocks; the scale follows from the plate's size."""
    scale = view.shape[1] // 15
    view[:] = item.tones[1]
    view[scale // 2 : -(scale // 2), scale // 2 : -(scale // 2)] = item.tones[0]
    for position, digit in enumerate(item.number):
        glyph = np.kron(GLYPHS[int(digit)], np.ones((scale, scale), dtype=bool))
        left, top = (2 + 6 * position) * scale, 2 * scale
        view[top : top + 7 * scale, left : left + 5 * scale][glyph] = item.tones[1]


def _free_box(
    rng: np.random.Generator, placed: list[SceneObject], width: int, height: int, box_width: int, box_height: int
) -> Box | None:
    """Return a box at least 6 pixels from every placed one and 2 from the border, or None after 40 tries."""
    if box_width > width - 4 or box_height > height - 4:
        return None
    lefts = rng.integers(2, width - box_width - 1, 40)
    tops = rng.integers(2, height - box_height - 1, 40)
    for left, top in zip(lefts.tolist(), tops.tolist(), strict=True):
        box = (left, top, left + box_width, top + box_height)
        if all(
            box[0] >= o.box[2] + 6 or o.box[0] >= box[2] + 6 or box[1] >= o.box[3] + 6 or o.box[1] >= box[3] + 6
            for o in placed
        ):
            return box
    return None


def _strokes(
    rng: np.random.Generator, width: int, height: int, base: int
) -> tuple[tuple[Box, tuple[int, int, int]], ...]:
    """Clutter: thin grey bars and small specks, 0 to 14 of them, in a grey unlike the background."""
    strokes = []
    for _ in range(int(rng.integers(0, 15))):
        kind = int(rng.integers(3))
        bar_width, bar_height = ((int(rng.integers(15, 70)), 2), (2, int(rng.integers(15, 70))), (5, 5))[kind]
        left, top = int(rng.integers(0, width - bar_width)), int(rng.integers(0, height - bar_height))
        grey = base - int(rng.integers(30, 110))
        strokes.append(((left, top, left + bar_width, top + bar_height), (grey, grey, grey)))
    return tuple(strokes)
