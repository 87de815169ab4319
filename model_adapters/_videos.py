"""Videos in a prompt: which columns show which frame, and when. What counts as a frame: docs/design/frames.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ivcp_eval.interface import ImageSpan
from model_adapters._transformers import images_by_length

if TYPE_CHECKING:
    from torch import Tensor


def videos_by_length(mask: Tensor, lengths: list[int]) -> list[list[tuple[int, Tensor]]]:
    """For each row its videos, each as a number among ``lengths`` and its columns.

    Args:
        mask: (B, S) bool on CPU, tokens of videos. lengths: of every video of the batch, row by row; beams may or may
            not repeat them.

    Raises:
        ValueError: the videos are not those of the prompt.
    """
    rows = images_by_length(mask, lengths)
    if rows is None:
        raise ValueError(
            f"the videos that were passed have {lengths} tokens, the rows of the prompt hold {mask.sum(1).tolist()}"
        )
    return [
        list(zip(videos, row.nonzero().flatten().split([lengths[i] for i in videos]), strict=True))
        for row, videos in zip(mask, rows, strict=True)
    ]


def per_video(values: Sequence[float], counts: list[int], repeats: int) -> list[list[float | None]]:
    """For each row the value of each of its videos; None where the values are not as many as the videos.

    Args:
        values: of every video of the batch, row by row. counts: videos of each row.
        repeats: how often beams repeat a row. `generate` repeats each value in place, those of a row together (as
            transformers 5.14 does), or none.
    """
    distinct = counts[::repeats]
    repeated = len(values) == repeats * sum(distinct)
    if not repeated and len(values) != sum(distinct):
        return [[None] * n for n in counts]
    if repeated and all(len(set(values[i : i + repeats])) == 1 for i in range(0, len(values), repeats)):
        values, repeated = values[::repeats], False
    parts = torch.tensor(values, dtype=torch.float64).split(counts if repeated else distinct)
    return [list(parts[row if repeated else row // repeats].tolist()) for row in range(len(counts))]


def row_repeats(ids: Tensor | None, mask: Tensor) -> int:
    """How often each row of a batch stands there in a row: the beams, which differ behind the last visual token only.

    Args:
        ids: (B, S) token ids. mask: (B, S) bool, visual tokens.
    """
    seen = mask.any(0).nonzero().flatten()
    if ids is None or not seen.numel():
        return 1
    prompt, batch = ids[:, : int(seen[-1]) + 1].cpu(), ids.shape[0]
    return next(
        r
        for r in range(batch, 0, -1)
        if batch % r == 0 and torch.equal(prompt[::r].repeat_interleave(r, dim=0), prompt)
    )


def in_prompt_order(*found: list[list[ImageSpan]]) -> list[list[ImageSpan]]:
    """For each row the images of all lists, as they stand in the prompt."""
    rows = zip(*found, strict=True)
    return [sorted((span for spans in row for span in spans), key=lambda span: int(span.columns[0])) for row in rows]
