"""How the views of an image become one line of tokens: thumbnail, separator, tiles, with a newline after each row.

Written from https://github.com/deepseek-ai/DeepSeek-VL2 @ ef9f91e (models/modeling_deepseek_vl_v2.py and
models/processing_deepseek_vl_v2.py). Legend: g tokens per side of a view, (w, h) tiles, E hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ivcp_eval.interface import ImageSpan, Rectangle, View
from model_adapters._vision import newlines_by_row

if TYPE_CHECKING:
    from torch import Tensor


def n_thumbnail(side: int) -> int:
    """Tokens of the thumbnail with its newlines: g (g + 1)."""
    return side * (side + 1)


def n_tokens(side: int, tiles: tuple[int, int]) -> int:
    """Tokens of one image: g (g + 1) + 1 + (h g)(w g + 1)."""
    width, height = tiles
    return n_thumbnail(side) + 1 + height * side * (width * side + 1)


def assemble(views: Tensor, tiles: tuple[int, int], newline: Tensor, separator: Tensor, head: bool) -> Tensor:
    """One image's tokens (N, E).

    Args:
        views: (1 + w h, g g, E): the thumbnail, then the tiles row by row.
        tiles: (w, h).
        newline, separator: (E,) learned tokens.
        head: the thumbnail comes first, else last.
    """
    width, height = tiles
    side = round(views.shape[1] ** 0.5)
    thumbnail = _lines(views[0].unflatten(0, (side, side)), newline)
    grid = views[1:].unflatten(1, (side, side)).unflatten(0, (height, width))  # h, w, g, g, E
    grid = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # h g, w g, E
    parts = [thumbnail, separator[None], _lines(grid, newline)]
    return torch.cat(parts if head else parts[::-1])


def _lines(grid: Tensor, newline: Tensor) -> Tensor:
    """(R, C, E) -> (R (C + 1), E): a newline after each row."""
    return torch.cat((grid, newline.expand(grid.shape[0], 1, -1)), dim=1).flatten(0, 1)


def spread(values: Tensor, tiles: tuple[int, int], head: bool) -> Tensor:
    """Per-cell signals of one image as signals of its tokens: a newline gets the mean of its row.

    Args:
        values: (1 + w h, g g, *): of the cells of its views.

    Returns:
        (N, *) float32. The separator, where no row precedes it, gets the mean of the image.
    """
    flat = values.flatten(0, 1)
    cells = torch.arange(flat.shape[0], device=flat.device).view(*values.shape[:2], 1)
    token = assemble(cells, tiles, cells.new_tensor([-1]), cells.new_tensor([-1]), head)[:, 0]
    return newlines_by_row(flat[token.clamp_min(0)], token < 0)


def padding_cells(size: tuple[int, int], side: int, image_size: int, cell: int) -> tuple[int, ...]:
    """Thumbnail tokens that show padding only, as indices into the thumbnail's g (g + 1) tokens; newlines never count.

    Args:
        size: (width, height) of the original image in pixels.
        side: g. image_size: pixels of the thumbnail's side. cell: pixels of a token's side (28 as published).

    The scaled image is measured as released IVC-Prune measures it (truncation, see its processing_deepseek_vl_v2.py
    @ 03afd9c), which can differ by a pixel from where Pillow puts it.
    """
    scale = min(image_size / size[0], image_size / size[1])
    shown = [_covered(int(length * scale), side, image_size, cell) for length in size]
    columns, rows = shown
    return tuple(y * (side + 1) + x for y in range(side) for x in range(side) if x not in columns or y not in rows)


def lay_out(
    side: int, head: bool, size: tuple[int, int] | None, image_size: int, cell: int, span: ImageSpan
) -> tuple[View, ...]:
    """The tiles as one grid, and the thumbnail; newlines and the separator are in neither.

    Args:
        head, side, size, image_size, cell: as above; ``size`` None: not known. span: with its ``tiles``.
    """
    assert span.tiles is not None
    width, height = (side * n for n in span.tiles)
    tiled_first = n_thumbnail(side) + 1 if head else 0
    thumbnail_first = 0 if head else span.columns.numel() - n_thumbnail(side)
    tiled = tiled_first + np.arange(height * (width + 1)).reshape(height, width + 1)
    thumbnail = thumbnail_first + np.arange(n_thumbnail(side)).reshape(side, side + 1)
    frame = (span.tiles[0] * image_size, span.tiles[1] * image_size)
    return (
        # Each tile's last cell reaches beyond it; laid out evenly, no cell is off by more than that.
        View("tiles", tiled[:, :-1], size and _rectangle(size, frame, frame)),
        View("overview", thumbnail[:, :-1], size and _rectangle(size, (image_size,) * 2, (side * cell,) * 2)),
    )


def _rectangle(size: tuple[int, int], frame: tuple[int, int], reach: tuple[int, int]) -> Rectangle:
    """What pixels 0..reach of a frame, into the middle of which the picture is fitted, show of the picture."""
    scale = min(frame[0] / size[0], frame[1] / size[1])
    starts = [-(whole - length * scale) / 2 / (length * scale) for whole, length in zip(frame, size, strict=True)]
    ends = [start + far / (length * scale) for start, far, length in zip(starts, reach, size, strict=True)]
    return starts[0], starts[1], ends[0], ends[1]


def _covered(length: int, side: int, image_size: int, cell: int) -> range:
    """Cells along one axis that overlap the ``length`` pixels centred in ``image_size``."""
    start = (image_size - length) // 2
    if length <= 0:
        return range(0)
    return range(start // cell, min(side, -(-(start + length) // cell)))
