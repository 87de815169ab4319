"""Keeps whole frames, spread evenly over the video: what fewer frames of the same video would have cost.

Differs: nothing to differ from; a control, to a video what `downsample` is to an image. Tokens of the other frames
leave behind the vision tower, so the frames that stay have the positions, and in Qwen3-VL the time stamps, that they
have in the longer video; the tower's own cost is not saved. What the budget leaves over after whole frames is spent on
one more, on tokens spread evenly over its grid. A grid step of a tower that joins two frames is one frame here. Of a
picture, tokens stay as in `uniform`. To sample fewer frames before the processor is the benchmark's setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signals
from ivcp_eval.interface.ops import evenly
from ivcp_eval.methods._clips import Clip, ClipsAtInput, in_turn


@dataclass(frozen=True)
class Method(ClipsAtInput):
    """Fewer frames at equal tokens."""

    faithfulness: ClassVar[Faithfulness] = "control"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    for_videos: ClassVar[bool] = True

    renumber: bool | None = False

    def choose(self, signals: Signals, clip: Clip) -> Tensor:
        """The middles of equal stretches of the video."""
        sizes = clip.sizes.tolist()
        frames = evenly(len(sizes), -(-clip.budget // max(sizes))).tolist()
        others = [frame for frame in range(len(sizes)) if frame not in frames]
        return clip.spread(in_turn(clip.budget, sizes, [[frame] for frame in (*frames, *others)]))
