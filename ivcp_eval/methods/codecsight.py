"""Keeps visual tokens that the video's codec says are new or move, and of those that stand still some, evenly.

Paper: https://arxiv.org/abs/2604.06036 (CodecSight: motion vectors and frame types decide which patches are dropped).
Reference: none; the abstract

A file holds the motion of every token of the prompt's videos, as the encoded stream has it (`motion_grids`). Tokens of
frames or blocks that are coded without reference to another frame come first, then those that moved most, as long as
they moved more than ``still``; if the budget holds more, it is filled with tokens that stand still. Of tokens that are
equal in this, those that stay are spread evenly.

Differs: the published system drops patches before the vision tower, which saves the tower's time; here the tower sees
all and tokens leave at the language model's input. Its reuse of the cache over overlapping windows of a stream, with a
refresh of some of it, is left out: a prompt is one clip. How vectors become a decision is not public: a token moves as
far as the longest vector in its cell since the step before, and ``still`` is our choice. The file is of one prompt,
whose videos it numbers from 0, and a benchmark of many clips needs a run for each. Without a file nothing is known to
move, and tokens are spread evenly over the video; so are a picture's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signals
from ivcp_eval.interface.ops import evenly
from ivcp_eval.methods._clips import Clip, CountedClips

POINTS = 5  # along each side of a block, at which its vector is looked at


@dataclass(frozen=True)
class Method(CountedClips):
    """CodecSight at the language model's input.

    Attributes:
        motion: safetensors file with a tensor (T, rows, columns) for each video of the prompt, named 0, 1, ...: how
            many pixels each token moved, infinite where it is new. None: nothing is known to move.
        still: pixels up to which a token stands still.
        counts: "ratio" (exact budgets), or "released": all that is new or moves stays, whatever the ratio, which
            decides only where nothing does.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    motion: Path | None = None
    still: float = 0.25

    def __post_init__(self) -> None:
        """Text from the command line is a path."""
        if self.motion is not None:
            object.__setattr__(self, "motion", Path(self.motion))
        super().__post_init__()
        if self.counts == "released" and self.motion is None:
            raise ValueError("counts='released' keeps what moves; give the file that says so, motion=FILE")
        if self.still < 0:
            raise ValueError(f"still={self.still} must be a number of pixels, 0 or more")

    def choose(self, signals: Signals, clip: Clip) -> Tensor:
        """What moves most; of what moves as much as the last of these, an even choice."""
        motion = self.motion_of(clip).to(clip.tokens.device)
        motion = torch.where(motion > self.still, motion, 0)
        if not self.exact and bool(motion.any()):
            return motion.nonzero().flatten()
        least = motion.sort(descending=True).values[clip.budget - 1]
        kept, equal = motion > least, (motion == least).nonzero().flatten()
        kept[equal[evenly(len(equal), clip.budget - int(kept.sum())).to(equal.device)]] = True
        return kept.nonzero().flatten()

    def motion_of(self, clip: Clip) -> Tensor:
        """(N,) how far each token of a clip moved.

        Raises:
            ValueError: the file has no such video, or one of another size.
        """
        frame = clip.frames[0].span.frame
        if self.motion is None or frame is None:
            return torch.zeros(len(clip.tokens))
        from safetensors import safe_open

        with safe_open(self.motion, framework="pt") as file:
            names = sorted(file.keys())
            if str(frame.clip) not in names:
                raise ValueError(f"{self.motion} has the videos {names}, the prompt has a video {frame.clip}")
            grids: Tensor = file.get_tensor(str(frame.clip)).float()
        expected = [(len(clip.frames), *(one.span.grid or (1, one.tokens.numel()))) for one in clip.frames]
        if {tuple(grids.shape)} != set(expected):
            raise ValueError(
                f"{self.motion} has motion of shape {tuple(grids.shape)} for video {frame.clip}, the prompt shows it "
                f"in {expected[0]} steps, rows and columns; make it for these"
            )
        if bool((grids.isnan() | (grids < 0)).any()):
            raise ValueError(
                f"{self.motion} has motion below 0 or NaN for video {frame.clip}; it is a length in pixels"
            )
        return grids.flatten().clamp_max(torch.finfo(grids.dtype).max)  # infinite scores count as broken ones


def motion_grids(video: Path | str, shown: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """(T, rows, columns) float32: how many pixels each token of a video moved since the step before.

    The longest motion vector in its cell, of all frames since then, shown or not. Infinite in the first step, in those
    whose last frame refers to no other, and where no block that does reaches. A file for a prompt's only video is
    ``safetensors.torch.save_file({"0": motion_grids(...)}, FILE)``.

    Args:
        video: an encoded file, of a codec whose vectors FFmpeg exports (H.264, MPEG-1, -2 and -4).
        shown: (T,) increasing, the last frame of each step, counted from 0. grid: rows and columns of tokens.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: the video is shorter, ``shown`` does not increase, or no frame has vectors.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("motion vectors are read with PyAV, which is not installed: `pip install av`") from error

    if list(shown) != sorted(set(shown)) or not shown or shown[0] < 0:
        raise ValueError(f"shown={list(shown)} must be increasing numbers of frames, 0 or more")
    rows, columns = grid
    steps: list[Tensor] = []
    now, any_vectors = torch.zeros(rows, columns), False
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"flags2": "+export_mvs"}
        for number, frame in enumerate(container.decode(stream)):
            vectors: Any = frame.side_data.get("MOTION_VECTORS")
            any_vectors = any_vectors or vectors is not None
            if vectors is not None:
                now = torch.maximum(now, block_motion(vectors.to_ndarray(), (frame.height, frame.width), grid))
            if number == shown[len(steps)]:
                new = not steps or vectors is None
                steps.append(torch.full_like(now, torch.inf) if new else now)
                now = torch.zeros(rows, columns)
                if len(steps) == len(shown):
                    break
    if len(steps) < len(shown):
        raise ValueError(f"{video} has fewer frames than {shown[-1] + 1}, of which the last is shown")
    if len(shown) > 1 and not any_vectors:
        raise ValueError(f"{video} has no motion vectors; its codec refers to no other frames or exports none")
    return torch.stack(steps)


def block_motion(vectors: Any, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(rows, columns) the longest of a frame's motion vectors in each cell, in pixels; infinite where none reaches.

    Args:
        vectors: structured array, as FFmpeg exports: middle ``dst_x``, ``dst_y`` and size ``w``, ``h`` of each block,
            ``motion_x``, ``motion_y`` in parts of a pixel, ``motion_scale`` of them. size: height, width in pixels.
    """
    part = {name: torch.from_numpy(vectors[name].astype("float32")) for name in vectors.dtype.names}
    length = torch.hypot(part["motion_x"], part["motion_y"]) / part["motion_scale"].clamp_min(1)
    offsets = (torch.arange(POINTS) + 0.5) / POINTS - 0.5
    ends = []
    for middle, side, pixels, cells in (("dst_y", "h", size[0], grid[0]), ("dst_x", "w", size[1], grid[1])):
        at = part[middle][:, None] + offsets * part[side][:, None]
        ends.append((at * cells / pixels).floor().long().clamp(0, cells - 1))
    cell = ends[0][:, :, None] * grid[1] + ends[1][:, None, :]
    found = torch.full((grid[0] * grid[1],), -1.0)
    found.scatter_reduce_(0, cell.flatten(), length[:, None, None].expand(cell.shape).flatten(), "amax")
    return torch.where(found < 0, torch.inf, found).view(grid)
