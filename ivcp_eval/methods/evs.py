"""Keeps the first frame of a video, and of the others the visual tokens that changed most since the frame before.

Paper: https://arxiv.org/abs/2510.14624 (Efficient Video Sampling: temporally static patches are dropped).
Reference: https://github.com/vllm-project/vllm @ d750efb (vllm/multimodal/video_prune/evs.py,
``compute_retention_mask``; served with ``--video-pruning-rate``)

A token's score is 1 - cosine to the token at the same place of the frame before, kept or not; what has none before it
comes first. The budget is the video's, so a frame in which nothing moves may lose every token.

Differs: as many stay as the budget says; vLLM rounds down and keeps at least one frame's tokens (counts="released").
Where the budget is smaller than the first frame, tokens spread evenly over that one stay; so of a picture, which vLLM
never prunes, they are `uniform`'s. With M-RoPE every token keeps its position in the unpruned prompt, as in vLLM;
vLLM's Qwen2.5-VL code, though, counts seconds per frame in whole ones, and text behind a grid that is higher than wide
on from its width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signals
from ivcp_eval.interface.ops import top
from ivcp_eval.methods._at_input import embeddings
from ivcp_eval.methods._clips import Clip, CountedClips, cosines, released_count


@dataclass(frozen=True)
class Method(CountedClips):
    """Efficient Video Sampling.

    Attributes:
        counts: "ratio" (exact budgets), or "released": vLLM's rounding, and at least one frame.
    """

    faithfulness: ClassVar[Faithfulness] = "faithful"

    def choose(self, signals: Signals, clip: Clip) -> Tensor:
        """The least like what was at their place."""
        k = clip.budget if self.exact else released_count(signals, clip, least=int(clip.sizes[0]))
        if k < clip.sizes[0]:
            return clip.spread([k] + [0] * (len(clip.frames) - 1))
        before = clip.same_place(range(-1, len(clip.frames) - 1))
        return top(-cosines(embeddings(signals, clip), before), k)
