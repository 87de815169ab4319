"""Scenes of the second embedded model: large, textured, partly hidden shapes on busy backgrounds.

Differs from ``tiny``'s scenes in what a token sees: one visual token covers 16 x 16 pixels and an object some
20 to 80 tokens, objects may hide part of each other, and a box is that of the *visible* part. Integer arithmetic
and constant tables only, so that one seed gives the same pixels on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ivcp_eval.lab.tiny.scenes import COLOURS, GLYPHS, SIGN, Box, SceneObject, shape_mask

#: Side in pixels of the area behind one visual token.
CELL = 16
#: (width, height) of full-size pictures: 256 visual tokens.
FULL_SIZES = ((256, 256),)
#: Shapes whose outlines are unlike in every piece. The tower's heads know all of the first embedded model's.
SHAPES = ("square", "triangle", "cross", "ring")
#: Textures that the tower's heads know, and those that are drawn.
TEXTURES = ("solid", "dotted", "horizontal", "vertical", "diagonal", "checked")
USED_TEXTURES = ("solid", "dotted", "diagonal")
#: Seeds that no other embedded model uses; the splits never overlap.
SPLITS = {"train": 10, "validation": 11, "test": 12}
#: Least visible share of an object that others partly hide.
LEAST_VISIBLE = 0.7
#: Least share of a cell that an object must cover for the cell to count as its token.
LEAST_COVER = 0.25


@dataclass(frozen=True)
class Placed(SceneObject):
    """An object whose ``box`` bounds its visible pixels and whose ``frame`` is the box it is drawn in."""

    frame: Box = (0, 0, 0, 0)


@dataclass(frozen=True)
class Scene:
    """A picture to be drawn, with what lies where.

    Attributes:
        width, height: size in pixels.
        background: two tones and the step in pixels of the pattern between them.
        clutter: rectangles (box, RGB) under the objects.
        objects: from the bottom to the top.
        owner: (height, width) int8, index of the object visible at each pixel, -1 for none.
        origin: place of the scene's left upper corner in pixels; the objects' boxes count from the same zero.
    """

    width: int
    height: int
    background: tuple[tuple[int, int, int], tuple[int, int, int], str, int]
    clutter: tuple[tuple[Box, tuple[int, int, int]], ...]
    objects: tuple[Placed, ...]
    owner: NDArray[np.int8]
    origin: tuple[int, int] = (0, 0)

    @property
    def shapes(self) -> tuple[Placed, ...]:
        """The objects without the sign."""
        return tuple(o for o in self.objects if o.shape != SIGN)

    @property
    def sign(self) -> Placed | None:
        """The number sign, if there is one."""
        return next((o for o in self.objects if o.shape == SIGN), None)


def scene_rng(split: str, index: int) -> np.random.Generator:
    """Generator of scene ``index`` of ``split`` (``train``, ``validation`` or ``test``)."""
    return np.random.Generator(np.random.PCG64([SPLITS[split], index]))


def sample_scene(
    rng: np.random.Generator,
    size: tuple[int, int] | None = None,
    objects: tuple[int, int] = (2, 3),
    sign_percent: int = 0,
) -> Scene:
    """Draw a scene of ``size`` (width, height) in pixels with about ``objects`` (least, most) objects, at least one."""
    width, height = size if size is not None else FULL_SIZES[rng.integers(len(FULL_SIZES))]
    count = int(rng.integers(objects[0], objects[1] + 1))
    # Few colours and shapes a scene, so that attributes repeat: counting, hard negatives, relations.
    colours = rng.permutation(list(COLOURS))[: rng.integers(2, len(COLOURS) + 1)]
    shapes = rng.permutation(list(SHAPES))[: rng.integers(2, len(SHAPES) + 1)]
    low, high = side_range(width, height, count)
    owner = np.full((height, width), -1, dtype=np.int8)
    placed: list[Placed] = []
    wants_sign = int(rng.integers(100)) < sign_percent and min(width, height) >= 80
    for _ in range(4 * count):
        if len(placed) == count:
            break
        if wants_sign and not placed:
            scale = int(rng.integers(4, 7)) if min(width, height) >= 128 else 4
            item = _paint(rng, SIGN, "white", (0, 0, 15 * scale, 11 * scale))
        else:
            side = int(rng.integers(low, high + 1))
            shape, colour = str(rng.choice(shapes)), str(rng.choice(colours))
            stretch = int(rng.integers(80, 126)) if shape != "square" else int(rng.integers(94, 107))
            item = _paint(rng, shape, colour, (0, 0, side, min(height - 4, max(30, side * stretch // 100))))
        done = _place(rng, owner, placed, item)
        if done is not None:
            placed.append(done)
    visible = tuple(replace(item, box=_bounds(owner == i)) for i, item in enumerate(placed))
    base = int(rng.integers(120, 236))
    return Scene(width, height, _background(rng, base), _clutter(rng, width, height, base), visible, owner)


def moved(scene: Scene, origin: tuple[int, int]) -> Scene:
    """``scene`` as a piece of a larger picture, its left upper corner at ``origin`` (x, y)."""
    x, y = origin
    objects = tuple(replace(o, box=(o.box[0] + x, o.box[1] + y, o.box[2] + x, o.box[3] + y)) for o in scene.objects)
    return replace(scene, objects=objects, origin=origin)


def side_range(width: int, height: int, count: int) -> tuple[int, int]:
    """Smallest and largest side in pixels of the objects of a scene of ``count``."""
    shorter = min(width, height)
    area = width * height / max(count, 2)
    high = int(min(0.8 * shorter, 112, 0.95 * area**0.5))
    return min(high - 8, max(34, high * 7 // 10)), high


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw ``scene`` as uint8 RGB of shape (height, width, 3)."""
    first, second, pattern, step = scene.background
    image = np.empty((scene.height, scene.width, 3), dtype=np.uint8)
    image[:] = first
    image[_pattern(pattern, scene.width, scene.height, step)] = second
    for (x1, y1, x2, y2), tone in scene.clutter:
        image[y1:y2, x1:x2] = tone
    for item in scene.objects:
        x1, y1, x2, y2 = item.frame
        view = image[y1:y2, x1:x2]
        if item.shape == SIGN:
            _draw_sign(view, item)
            continue
        mask = shape_mask(item.shape, x2 - x1, y2 - y1)
        view[mask] = item.tones[0]
        view[mask & _pattern(item.texture, x2 - x1, y2 - y1, 10)] = item.tones[1]
    return image


def cell_cover(scene: Scene) -> NDArray[np.float32]:
    """(objects, cells) share of every cell that each object visibly covers, cells row by row."""
    rows, columns = scene.height // CELL, scene.width // CELL
    blocks = scene.owner.reshape(rows, CELL, columns, CELL)
    cover = [(blocks == i).mean((1, 3), dtype=np.float32).ravel() for i in range(len(scene.objects))]
    return np.stack(cover)


def cell_owner(scene: Scene) -> NDArray[np.int64]:
    """(cells,) index of the object that covers most of each cell, -1 where none covers enough of it."""
    cover = cell_cover(scene)
    best = cover.argmax(0)
    return np.where(cover.max(0) >= LEAST_COVER, best, -1)


def _place(rng: np.random.Generator, owner: NDArray[np.int8], placed: list[Placed], item: Placed) -> Placed | None:
    """Put ``item`` on top where it hides little of the others, in at most 12 tries; None if that fails."""
    height, width = owner.shape
    x2, y2 = item.box[2], item.box[3]
    if x2 > width - 4 or y2 > height - 4:
        return None
    mask = np.ones((y2, x2), dtype=bool) if item.shape == SIGN else shape_mask(item.shape, x2, y2)
    # Five in six objects stay clear of the others, so that hidden parts are common but not the rule.
    clear = int(rng.integers(6)) > 0
    lefts, tops = rng.integers(2, width - x2 - 1, 12).tolist(), rng.integers(2, height - y2 - 1, 12).tolist()
    for left, top in zip(lefts, tops, strict=True):
        view = owner[top : top + y2, left : left + x2]
        hidden = np.bincount(view[mask] + 1, minlength=len(placed) + 1)[1:]
        if clear and hidden.any():
            continue
        if all(_stays_visible(owner, i, o, int(n)) for i, (o, n) in enumerate(zip(placed, hidden, strict=True)) if n):
            view[mask] = len(placed)
            return replace(item, frame=(left, top, left + x2, top + y2))
    return None


def _stays_visible(owner: NDArray[np.int8], index: int, item: Placed, hidden: int) -> bool:
    """Tell whether enough of ``item`` stays visible when ``hidden`` more of its pixels are covered."""
    if item.shape == SIGN:
        return False
    x1, y1, x2, y2 = item.frame
    whole = int(shape_mask(item.shape, x2 - x1, y2 - y1).sum())
    return int((owner[y1:y2, x1:x2] == index).sum()) - hidden >= LEAST_VISIBLE * whole


def _bounds(mask: NDArray[Any]) -> Box:
    """Box of the true pixels of ``mask``, right and bottom edges exclusive."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _paint(rng: np.random.Generator, shape: str, colour: str, box: Box) -> Placed:
    if shape == SIGN:
        dark, light = int(rng.integers(0, 50)), int(rng.integers(235, 256))
        return Placed(SIGN, colour, "solid", box, ((light,) * 3, (dark,) * 3), str(rng.integers(10, 100)))
    texture = USED_TEXTURES[rng.integers(len(USED_TEXTURES))]
    tone = np.clip(np.array(COLOURS[colour]) + rng.integers(-15, 16, 3), 0, 255)
    # The second tone is the first one darkened or lightened by 30 %, so the hue still names the object.
    second = tone * 7 // 10 if rng.integers(2) else (tone * 7 + 255 * 3) // 10
    first_tone, second_tone = (tuple(int(c) for c in t) for t in (tone, second))
    return Placed(shape, colour, texture, box, (first_tone, second_tone))  # type: ignore[arg-type]


def _background(rng: np.random.Generator, base: int) -> tuple[Any, Any, str, int]:
    first = np.clip(base + rng.integers(-12, 13, 3), 0, 255)
    second = np.clip(first + int(rng.integers(-24, 25)), 0, 255)
    pattern, step = USED_TEXTURES[rng.integers(len(USED_TEXTURES))], int(rng.integers(8, 40))
    return tuple(int(c) for c in first), tuple(int(c) for c in second), pattern, step


def _clutter(
    rng: np.random.Generator, width: int, height: int, base: int
) -> tuple[tuple[Box, tuple[int, int, int]], ...]:
    """Bars and specks in greys and in the objects' colours: a coloured pixel alone is no object."""
    pieces = []
    palette = list(COLOURS.values())
    for _ in range(int(rng.integers(0, width * height // 3000 + 2))):
        bar = int(rng.integers(15, 64))
        w, h = ((bar, 3), (3, bar), (6, 6), (4, 9))[rng.integers(4)]
        w, h = min(w, width - 1), min(h, height - 1)
        left, top = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        grey = int(np.clip(base - rng.integers(-60, 110), 0, 255))
        tone = palette[rng.integers(len(palette))] if rng.integers(3) == 0 else (grey, grey, grey)
        pieces.append(((left, top, left + w, top + h), tone))
    return tuple(pieces)


def _draw_sign(view: NDArray[np.uint8], item: SceneObject) -> None:
    """Light plate, dark frame, two digits of 5 x 7 blocks; the scale follows from the plate's size."""
    scale = view.shape[1] // 15
    view[:] = item.tones[1]
    view[scale // 2 : -(scale // 2), scale // 2 : -(scale // 2)] = item.tones[0]
    for position, digit in enumerate(item.number):
        glyph = np.kron(GLYPHS[int(digit)], np.ones((scale, scale), dtype=bool))
        left, top = (2 + 6 * position) * scale, 2 * scale
        view[top : top + 7 * scale, left : left + 5 * scale][glyph] = item.tones[1]


@lru_cache(maxsize=20000)
def _pattern(texture: str, width: int, height: int, step: int) -> NDArray[np.bool_]:
    """(height, width) mask of the pixels of the second tone."""
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    if texture == "solid":
        return np.zeros((height, width), dtype=bool)
    if texture == "dotted":
        half = step // 2
        return ((x % step - half) ** 2 + (y % step - half) ** 2) <= step * step // 16
    if texture == "checked":
        return (x // step + y // step) % 2 == 1
    lines = {"horizontal": y + 0 * x, "vertical": x + 0 * y, "diagonal": x + y}[texture]
    return lines % step * 5 >= step * 3
