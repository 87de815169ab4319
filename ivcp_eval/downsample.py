"""Shrinks an image before the processor, until it costs a share of its visual tokens: the plainest way to save them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ivcp_eval.ops import budget

if TYPE_CHECKING:
    from PIL.Image import Image

    from ivcp_eval.interface import AbstractAdapter


Size = tuple[int, int]


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


def shrunk_to_count(
    count: Callable[[list[Size]], list[int]], size: Size, share: float, step: float = 0.98, smallest: int = 28
) -> Size:
    """For families whose tiling decides: the smaller picture of the same proportions that uses most tokens allowed.

    Of pictures of equal cost the largest. Tilings are few, so the result may cost well below what is allowed.

    Args:
        count: visual tokens of pictures of these sizes.
        size: (width, height) in pixels.
        step: from one candidate's sides to the next one's. Rounding to pixels must not change the proportions by more.
        smallest: pixels of the longer side at which to stop.

    Returns:
        (width, height) with at most ``budget(share, tokens of size)`` tokens.

    Raises:
        ValueError: every smaller picture costs more; says what the cheapest costs.
    """
    n_steps = math.floor(math.log(smallest / max(size)) / math.log(step)) if max(size) > smallest else 0
    scaled = [(max(1, round(size[0] * step**i)), max(1, round(size[1] * step**i))) for i in range(n_steps + 1)]
    aspect = math.log(size[0] / size[1])
    sizes = [(w, h) for w, h in scaled if abs(math.log(w / h) - aspect) <= -math.log(step)]
    costs = dict(zip(sizes, count(sizes), strict=True))
    allowed, least = budget(share, costs[size]), min(costs.values())
    if least > allowed:
        raise ValueError(
            f"downsample cannot bring an image of {size[0]} x {size[1]} down to {share:g} of its {costs[size]} visual "
            f"tokens: in these proportions the family spends at least {least} ({least / costs[size]:.3f}). Ask for a "
            "higher ratio, or leave such images out."
        )
    return max((s for s in sizes if costs[s] <= allowed), key=lambda s: (costs[s], s[0] * s[1]))


def shrink(image: Image, adapter: AbstractAdapter, processor: Any, share: float) -> Image:
    """The image at the size where it costs ``share`` of its visual tokens (bicubic, like the processors).

    Raises:
        ValueError: the family's number of visual tokens does not follow the size of the image.
    """
    size = adapter.shrunk_size(processor, image.size, share)
    if size is None:
        raise ValueError("downsample cannot run on this family: every image costs the same number of visual tokens")
    return image if size == image.size else image.resize(size, resample=3)


def check_cost(cost: int, whole: int, share: float, n_images: int) -> None:
    """Refuse pictures, shrunk one by one, that cost more together than ``share`` of their ``whole`` visual tokens.

    Families may encode several images of a sample in another way than one (LLaVA-OneVision: one overview each).

    Raises:
        ValueError: they do; each image may have rounded up to one token more.
    """
    if cost > share * whole + n_images:
        raise ValueError(
            f"downsample brought {n_images} images from {whole} to {cost} visual tokens, more than {share:g} of them: "
            "among several images the family spends the same on each, whatever its size. Choose another method."
        )
