"""Shrinks an image before the processor, until it costs a share of its visual tokens: the plainest way to save them."""

from __future__ import annotations

import math
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
