"""Shrinks an image before the processor, until it costs a share of its visual tokens: the plainest way to save them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ivcp_eval.ops import budget

if TYPE_CHECKING:
    from PIL.Image import Image

    from ivcp_eval.interface import AbstractAdapter


def shrunk_grid(rows: int, columns: int, share: float) -> tuple[int, int]:
    """A grid of at most ``budget(share, rows * columns)`` cells with nearly the same aspect ratio.

    Of the grids that use at least 90 % of the cells that the fullest uses, the one nearest in aspect ratio (log
    scale), then the fuller one.

    Returns:
        (rows, columns), each between 1 and what it was.
    """
    allowed = budget(share, rows * columns)
    fits = [(r, min(columns, allowed // r)) for r in range(1, min(rows, allowed) + 1)]
    most = max(r * c for r, c in fits)
    candidates = [(r, c) for r, widest in fits for c in range(1, widest + 1) if r * c >= 0.9 * most]
    aspect = math.log(rows / columns)
    return min(candidates, key=lambda grid: (abs(math.log(grid[0] / grid[1]) - aspect), -grid[0] * grid[1]))


def shrunk_to_count(count: Callable[[int, int], int], size: tuple[int, int], share: float) -> tuple[int, int]:
    """For families whose tiling decides: the smaller picture, in its own proportions, that costs most tokens allowed.

    Sides shrink in steps of 1 %, down to one pixel. Of pictures of equal cost the largest.

    Args:
        count: ``count(width, height)`` gives the visual tokens of a picture.
        size: (width, height).

    Returns:
        (width, height) with at most ``budget(share, count(*size))`` tokens.

    Raises:
        ValueError: every smaller picture costs more; says what the cheapest costs.
    """
    whole, longest = count(*size), max(size)
    allowed = budget(share, whole)
    steps = range(math.ceil(math.log(longest) / -math.log(0.99)) + 1)
    sizes = [tuple(max(1, round(side * 0.99**step)) for side in size) for step in steps]
    costs = {(width, height): count(width, height) for width, height in sizes}
    fits = {smaller: cost for smaller, cost in costs.items() if cost <= allowed}
    if not fits:
        least = min(costs.values())
        raise ValueError(
            f"downsample cannot bring an image of {size[0]} x {size[1]} down to {share:g} of its {whole} visual "
            f"tokens: in these proportions the family spends {least} or more ({least / whole:.2f}). Ask for a higher "
            "ratio, or leave such images out."
        )
    return max(fits, key=lambda smaller: (fits[smaller], smaller[0] * smaller[1]))


def shrink(image: Image, adapter: AbstractAdapter, processor: Any, share: float) -> Image:
    """The image at the size where it costs ``share`` of its visual tokens (bicubic, like the processors).

    Raises:
        ValueError: the family's number of visual tokens does not follow the size of the image.
    """
    size = adapter.shrunk_size(processor, image.size, share)
    if size is None:
        raise ValueError(
            "downsample cannot run on this family: the number of visual tokens does not follow the size of the image"
        )
    return image if size == image.size else image.resize(size, resample=3)
