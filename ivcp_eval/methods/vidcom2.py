"""Keeps the visual tokens least like the mean of their video and of their frame, and more of frames that stand out.

Paper: https://arxiv.org/abs/2505.14454 (VidCom2: frame uniqueness decides the share of a frame).
Reference: https://github.com/vllm-project/vllm @ 0f17ee0 (vllm/multimodal/video_prune/vidcom2.py; served with
``--video-pruning-method vidcom2``), https://github.com/xuyang-liu16/VidCom2 @ 944a17d (the authors' own,
token_compressor/vidcom2/vidcom2.py)

Tokens are compared, as unit vectors, in the half of their channels that varies least over the video. How typical a
token is of a mean is a sum of five Gaussian kernels of the distance; its score is that of the video's mean plus that of
the frame's, and the lowest stay. A frame's share grows with the softmax of how untypical it is of the video. The shares
seldom add up to the budget: tokens of highest score leave, over the whole video, or those of lowest enter.

Differs: as many stay as the budget says; vLLM rounds down and keeps at least one token a frame (counts="released"), the
authors' code keeps what the shares add up to (counts="shares"). Newlines stay where they are and count; the
authors' LLaVA-Video code moves those of a frame behind it, beside the budget. A picture is a video of one frame: what
is least like its mean stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signals
from ivcp_eval.interface.ops import place_in_group, ranking, unit_rows
from ivcp_eval.methods._at_input import embeddings
from ivcp_eval.methods._clips import Clip, ClipsAtInput, check_counts, released_count

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # of the Gaussian kernels
TEMPERATURE = 0.01


@dataclass(frozen=True)
class Scores:
    """How typical the tokens are, and what follows for their frames.

    Attributes:
        video, frame: (N,) of the mean of their video, of their frame. scales: (T,) the share that a frame keeps.
    """

    video: Tensor
    frame: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Method(ClipsAtInput):
    """VidCom2.

    Attributes:
        counts: "ratio" (exact budgets), "released": vLLM's rounding; "shares": the authors', of every frame its share.
    """

    faithfulness: ClassVar[Faithfulness] = "faithful"

    counts: Literal["ratio", "released", "shares"] = "ratio"

    def __post_init__(self) -> None:
        """Refuse another way of counting."""
        check_counts(self.counts, ("ratio", "released", "shares"))

    @property
    def exact(self) -> bool:
        """Unless a released rounding is asked for."""
        return self.counts == "ratio"

    def choose(self, signals: Signals, clip: Clip) -> Tensor:
        """Every frame's share of its least typical tokens, and what the budget adds or takes."""
        assert signals.cut is not None
        scores = self.scores(embeddings(signals, clip), clip, signals.cut.ratio)
        total, counts = scores.video + scores.frame, self.frame_counts(scores, clip)
        within = place_in_group(-total, clip.frame) < counts[clip.frame]
        if self.counts == "shares":
            return within.nonzero().flatten()
        k = clip.budget if self.exact else released_count(signals, clip, least=len(clip.frames))
        order = ranking(-total)
        first = order[torch.sort(~within[order], stable=True).indices]
        return first[:k].sort().values

    def frame_counts(self, scores: Scores, clip: Clip) -> Tensor:
        """(T,) how many tokens of each frame its share is, at least one."""
        return (scores.scales.double() * clip.sizes).round().long().clamp_min(1)

    def scores(self, states: Tensor, clip: Clip, ratio: float) -> Scores:
        """Of the clip's tokens with ``states`` (N, E)."""
        half = max(1, states.shape[1] // 2)
        calm = ranking(-states.float().var(dim=0, correction=0))[:half].sort().values
        unit = unit_rows(states[:, calm])
        mean = unit.new_zeros(len(clip.frames), half).index_add_(0, clip.frame, unit) / clip.sizes[:, None]
        video = _typical((unit - unit.mean(dim=0)).square().sum(dim=1))
        frame = _typical((unit - mean[clip.frame]).square().sum(dim=1))
        of_frame = torch.zeros_like(mean[:, 0]).index_add_(0, clip.frame, video) / clip.sizes
        share = (-of_frame / TEMPERATURE).softmax(dim=0)
        return Scores(video, frame, (ratio * (1 + share - share.mean())).clamp_max(1))


def _typical(apart: Tensor) -> Tensor:
    """(N,) a sum of Gaussian kernels of the squared distances ``apart`` (N,)."""
    return torch.stack([(-apart / (2 * width)).exp() for width in WIDTHS]).sum(dim=0)
