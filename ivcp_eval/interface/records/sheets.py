"""A video's steps side by side, row by row, as one picture, and its masks as those of that picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ivcp_eval.interface.method import WHOLE, View
from ivcp_eval.interface.records.masks import CutMask, ImageCells, Masks

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["drawn_steps", "sheet_of", "sheet_of_masks"]

_MARGIN = 3  # pixels beside the time of a step, which stands in its upper left corner


def drawn_steps(steps: int, most: int | None = None) -> list[int]:
    """Which of a video's steps a sheet shows: all, or ``most`` of them from the first to the last, evenly."""
    if most is None or steps <= most:
        return list(range(steps))
    return [round(i * (steps - 1) / (most - 1)) for i in range(most)]


def _columns(steps: int) -> int:
    return math.ceil(math.sqrt(steps))


def sheet_of(frames: Sequence[Image], seconds: Sequence[float], steps: int) -> Image:
    """The first frame of each of ``steps``, with its time.

    Args:
        frames: what is shown of a video, of one size. seconds: when. steps: of equally many frames, the last one of
            what is left.
    """
    from PIL import Image, ImageDraw, ImageFont

    joined = math.ceil(len(frames) / steps)
    across, (width, height) = _columns(steps), frames[0].size
    sheet = Image.new("RGB", (across * width, math.ceil(steps / across) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(10, height // 8))
    for step, number in enumerate(range(0, len(frames), joined)):
        x, y = step % across * width, step // across * height
        sheet.paste(frames[number], (x, y))
        text = f"{seconds[number]:.4g} s"
        at = (x + _MARGIN, y + _MARGIN)
        pen.rectangle(pen.textbbox(at, text, font=font), fill="white")
        pen.text(at, text, fill="black", font=font)
    return sheet


def sheet_of_masks(masks: Masks, clip: int = 0, most: int | None = None) -> Masks:
    """The masks of a clip as those of one image that is its sheet; others as they are, if there is no such clip.

    They are for drawing: merged tokens are known as such, not where they went. Without cells if those of the steps
    differ, or do not span the whole frame. ``most``: steps that have cells (`drawn_steps`); the tokens of all count.
    """
    import numpy as np

    own = [number for number, image in enumerate(masks.images) if image.frame and image.frame.clip == clip]
    if not own:
        return masks
    sizes = [image.n_tokens for image in masks.images]
    start, n_tokens = sum(sizes[: own[0]]), sum(sizes[number] for number in own)
    tokens = slice(start, start + n_tokens)
    cuts = [CutMask(c.layer, c.kept[tokens], None if c.merged is None else c.merged[tokens]) for c in masks.cuts]
    found = [masks.images[number].views[:1] for number in own]
    shapes = {views[0].cells.shape if views and views[0].covers in (None, WHOLE) else None for views in found}
    shown: tuple[View, ...] = ()
    if len(shapes) == 1 and None not in shapes:
        rows, columns = found[0][0].cells.shape
        drawn = drawn_steps(len(own), most)
        across = _columns(len(drawn))
        cells = np.full((math.ceil(len(drawn) / across), across, rows, columns), -1, np.int64)
        for place, step in enumerate(drawn):
            first = sum(sizes[own[0] : own[step]])
            of_step = found[step][0].cells
            cells[divmod(place, across)] = np.where(of_step < 0, -1, of_step + first)
        shown = (View("frames", cells.transpose(0, 2, 1, 3).reshape(-1, across * columns), WHOLE),)
    return Masks((ImageCells(n_tokens, shown),), tuple(cuts))
