"""Shrinks an image before the processor, until it costs a share of its visual tokens: the plainest way to save them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ivcp_eval.interface.ops import budget

if TYPE_CHECKING:
    from PIL.Image import Image

    from ivcp_eval.interface import AbstractAdapter


Size = tuple[int, int]


def shrunk_grid(rows: int, columns: int, allowed: int) -> tuple[int, int]:
    """A grid of at most ``allowed`` cells with nearly the aspect ratio of ``rows`` x ``columns``.

    Of the grids that use at least 90 % of the cells that the fullest uses, the one nearest in aspect ratio (log
    scale), then the fuller one.

    Returns:
        (rows, columns), each between 1 and what it was.
    """
    fits = [(r, min(columns, allowed // r)) for r in range(1, min(rows, allowed) + 1)]
    most = max(r * c for r, c in fits)
    candidates = [(r, c) for r, widest in fits for c in range(1, widest + 1) if r * c >= 0.9 * most]
    aspect = math.log(rows / columns)
    return min(candidates, key=lambda grid: (abs(math.log(grid[0] / grid[1]) - aspect), -grid[0] * grid[1]))


def shrunk_to_count(
    count: Callable[[list[Size]], list[int]], size: Size, share: float, step: float = 0.98, smallest: int = 28
) -> Size:
    """Where tiles are padded, not stretched: the smaller picture of the same proportions that uses most tokens allowed.

    Of pictures of equal cost the largest. Tilings are few, so the result may cost well below what is allowed.

    Args:
        count: visual tokens of pictures of these sizes.
        size: (width, height) in pixels.
        step: from one candidate's sides to the next one's. Rounding to pixels must not change the proportions by more.
        smallest: pixels of the longer side at which to stop.

    Returns:
        (width, height) with at most ``budget(share, tokens of size)`` tokens, or with the fewest there are.
    """
    n_steps = math.floor(math.log(smallest / max(size)) / math.log(step)) if max(size) > smallest else 0
    scaled = [(max(1, round(size[0] * step**i)), max(1, round(size[1] * step**i))) for i in range(n_steps + 1)]
    aspect = math.log(size[0] / size[1])
    sizes = [(w, h) for w, h in scaled if abs(math.log(w / h) - aspect) <= -math.log(step)]
    costs = dict(zip(sizes, count(sizes), strict=True))
    allowed = max(budget(share, costs[size]), min(costs.values()))
    return max((s for s in sizes if costs[s] <= allowed), key=lambda s: (costs[s], s[0] * s[1]))


def shrunk_to_tiles(count: Callable[[list[Size]], list[int]], size: Size, share: float, tile: Size, most: int) -> Size:
    """Where every picture is stretched to a grid of tiles: the affordable grid that keeps most of its resolution.

    Such a family chooses its grid by proportions more than by size, so the picture takes on the grid's.

    Args:
        count, size, share: as for `shrunk_to_count`. tile: (width, height) in pixels. most: tiles of one picture.

    Returns:
        (width, height): ``size`` itself, or whole tiles; of the grids that resolve the coarser side equally well the
        one nearest in aspect ratio (log scale), then the dearer one.
    """
    grids = [(columns, rows) for rows in range(1, most + 1) for columns in range(1, most // rows + 1)]
    sizes = [(columns * tile[0], rows * tile[1]) for columns, rows in grids]
    whole, *counts = count([size, *sizes])
    costs = dict(zip(sizes, counts, strict=True))
    allowed = max(budget(share, whole), min(counts))
    if allowed >= whole:
        return size

    def worth(candidate: Size) -> tuple[float, float, int]:
        across, down = candidate[0] / size[0], candidate[1] / size[1]
        return min(across, down), -abs(math.log(across / down)), costs[candidate]

    return max((candidate for candidate in sizes if costs[candidate] <= allowed), key=worth)


def shrink(image: Image, adapter: AbstractAdapter, processor: Any, share: float) -> Image:
    """The image at the size where it costs ``share`` of its visual tokens, or the least (bicubic, like the processors).

    Raises:
        ValueError: the family's number of visual tokens does not follow the size of the image.
    """
    size = adapter.shrunk_size(processor, image.size, share)
    if size is None:
        raise ValueError("downsample cannot run on this family: every image costs the same number of visual tokens")
    return image if size == image.size else image.resize(size, resample=3)
