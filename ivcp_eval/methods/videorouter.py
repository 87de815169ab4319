"""Keeps more of the frames that the question attends to early in the decoder, and strides over all frames' grids.

Paper: https://arxiv.org/abs/2605.05848 (VideoRouter: the first four layers score frames; strides 1, 4 and, global, 2).
Reference: none; the abstract and third-party notes

Before layer 4, a frame's relevance is the attention that its tokens get from the question in layer 3, mean over heads,
words and tokens. Relevant frames are kept densely, the others with a stride four times as long. The budget of the video
decides how long: 1 and 4, as published, where that is what it holds; a relevant frame that is whole leaves the rest to
the others.

Differs: neither the weights of the published routers nor their data are public. `ivcp lab train videorouter` makes a
router of frames for a model: ``weights``, which sees the states before layer 4; without a file relevance is attention,
and which frames are relevant is our rule, ``relevant``. Whether the video as a whole is asked about, ``policy``, is not
decided at all. Both are variants. How attention depends on a frame's place in the prompt is not corrected. Strides are
of tokens, spread evenly over the grid; whether the paper means tokens or sides is not public. The paper's model reads
the chosen tokens anew; here they go on from layer 4 with what they saw of the others below, though no cache holds
these. A picture is a video of one frame: its tokens are `uniform`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from ivcp_eval.interface import Cut, Faithfulness, ModelFacts, Selection, Signal, Signals
from ivcp_eval.interface.ops import apportion, mean_attention, ranking
from ivcp_eval.methods._clips import Clip, ClipsAtInput
from ivcp_eval.methods._trained import FrameRouter, answer_of

ROUNDING = 1e-4  # above the mean by less than this share of it is no difference
_STATE = "videorouter"


@dataclass(frozen=True)
class Method(ClipsAtInput):
    """VideoRouter, with a router of frames that was trained here or without one.

    Attributes:
        weights: file of a router (`ivcp lab train videorouter`); None: attention.
        layer: whose input is cut, by the attention of the layer before; in a shallower model that of the last one.
        policy: "fragment", relevant frames are dense; "global", all are alike.
        relevant: the share of frames that is; None: those that the router calls so, or with more attention than the
            mean frame.
        stride: of other frames, as a multiple of the relevant ones'.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"query", "key"})
    faithfulness: ClassVar[Faithfulness] = "variant"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    renumber: bool | None = False
    weights: Path | None = None
    layer: int = 4
    policy: Literal["fragment", "global"] = "fragment"
    relevant: float | None = None
    stride: float = 4.0

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if self.policy not in ("fragment", "global"):
            raise ValueError(f"policy={self.policy!r} must be 'fragment' or 'global'")
        if self.layer < 1:
            raise ValueError(f"layer={self.layer} has no layer before it whose attention could rank; use 1 or more")
        if not 0 <= (self.relevant or 0) <= 1 or self.stride < 1:
            raise ValueError(f"relevant={self.relevant} must lie in 0..1, stride={self.stride} be 1 or more")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut, for every layer's cache."""
        layer = max(1, model.first_cut, min(self.layer, model.n_layers - 1))
        return (Cut(layer, ratio, renumber=model.renumbers(self.renumber), budget="clip"),)

    def select(self, signals: Signals) -> Selection:
        """Video by video, by the attention of the whole row where there is no router."""
        if self.weights is None:
            signals.memory[_STATE] = mean_attention(signals, signals.question)
        return super().select(signals)

    def choose(self, signals: Signals, clip: Clip) -> Tensor:
        """As many of each frame as its stride says, evenly spread."""
        dense = self.dense(self.relevance(signals, clip)) if self.policy == "fragment" else set()
        sizes = clip.sizes.tolist()
        shares = [size * (self.stride if frame in dense else 1) for frame, size in enumerate(sizes)]
        return clip.spread(apportion(clip.budget, shares, sizes))

    def relevance(self, signals: Signals, clip: Clip) -> Tensor:
        """(T,) of each frame; from a router, above 0 is relevant."""
        if self.weights is None:
            return frame_means(signals.memory[_STATE][clip.tokens], clip)
        question = signals.hidden[signals.question]
        scores: Tensor = answer_of(self.weights, "videorouter", FrameRouter, frame_states(signals, clip), question)
        return scores

    def dense(self, relevance: Tensor) -> set[int]:
        """The frames that are kept densely, by their ``relevance`` (T,)."""
        if self.relevant is None and self.weights is not None:
            count = int((relevance > 0).sum())
        elif self.relevant is None:
            count = int((relevance > relevance.nanmean() * (1 + ROUNDING)).sum())
        else:
            count = round(self.relevant * len(relevance))
        return set(ranking(relevance)[:count].tolist())


def frame_states(signals: Signals, clip: Clip) -> Tensor:
    """(T, E) mean state of each frame's tokens."""
    return frame_means(signals.hidden[signals.visual[clip.tokens]].float(), clip)


def frame_means(values: Tensor, clip: Clip) -> Tensor:
    """(T, ...) mean of ``values`` (N, ...) over the tokens of each frame."""
    sums = values.new_zeros(len(clip.sizes), *values.shape[1:]).index_add_(0, clip.frame, values)
    return sums / clip.sizes.view(-1, *[1] * (values.ndim - 1))
