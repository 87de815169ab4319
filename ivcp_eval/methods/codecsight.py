"""Keeps visual tokens that the video's codec says are new or move, and of those that stand still some, evenly.

Paper: https://arxiv.org/abs/2604.06036 (CodecSight: motion vectors and frame types decide which patches are dropped).
Reference: none; the abstract

The reader of videos takes the motion vectors from the encoded file as it decodes it, and gives every frame how far its
blocks moved since the frame shown before (`Frame.motion`). Tokens of frames or blocks that are coded without reference
to another frame come first, then those that moved most, as long as they moved more than ``still``; if the budget holds
more, it is filled with tokens that stand still. Of tokens that are equal in this, those that stay are spread evenly.

Differs: the published system drops patches before the vision tower, which saves the tower's time; here the tower sees
all and tokens leave at the language model's input. Its reuse of the cache over overlapping windows of a stream, with a
refresh of some of it, is left out: a prompt is one clip. How vectors become a decision is not public: a token moves as
far as the longest vector in its cell since the step before, and ``still`` is our choice. Frames that come as pictures,
and files of codecs whose vectors FFmpeg does not export (HEVC, VP9, AV1), are encoded as MPEG-4 for this. Of pictures,
and of frames whose motion nobody gives to `prune`, nothing is known to move, and tokens are spread evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from ivcp_eval.interface import Faithfulness, Signal, Signals
from ivcp_eval.interface.ops import evenly
from ivcp_eval.methods._clips import Clip, CountedClips


@dataclass(frozen=True)
class Method(CountedClips):
    """CodecSight at the language model's input.

    Attributes:
        still: pixels up to which a token stands still.
        counts: "ratio" (exact budgets), or "released": all that is new or moves stays, whatever the ratio, which
            decides only where nothing does.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"
    needs: ClassVar[frozenset[Signal]] = frozenset({"motion"})

    still: float = 0.25

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if self.still < 0:
            raise ValueError(f"still={self.still} must be a number of pixels, 0 or more")

    def choose(self, signals: Signals, clip: Clip) -> Tensor:
        """What moves most; of what moves as much as the last of these, an even choice."""
        motion = motion_of(clip).to(clip.tokens.device)
        motion = torch.where(motion > self.still, motion, 0)
        if not self.exact and bool(motion.any()):
            return motion.nonzero().flatten()
        least = motion.sort(descending=True).values[clip.budget - 1]
        kept, equal = motion > least, (motion == least).nonzero().flatten()
        kept[equal[evenly(len(equal), clip.budget - int(kept.sum())).to(equal.device)]] = True
        return kept.nonzero().flatten()


def motion_of(clip: Clip) -> Tensor:
    """(N,) float32: how many pixels each token of a clip moved, infinite scores as the largest number.

    Raises:
        ValueError: motion that is no length.
    """
    found = []
    for image in clip.frames:
        motion, grid = image.span.frame and image.span.frame.motion, image.span.grid
        if motion is None or grid is None or image.tokens.numel() != grid[0] * grid[1]:
            found.append(torch.zeros(image.tokens.numel()))
            continue
        cells = torch.as_tensor(motion, dtype=torch.float32)
        if cells.ndim != 2 or bool((cells.isnan() | (cells < 0)).any()):
            shape, frame = tuple(cells.shape), image.span.frame
            raise ValueError(f"got motion {shape} of {frame}, expected (rows, columns) of lengths in pixels")
        found.append(adaptive_max_pool2d(cells[None], grid).flatten())
    return torch.cat(found).clamp_max(torch.finfo(torch.float32).max)
