"""Keeps every other frame whole and of those between what is least like it; hides the rest of the cache step by step.

Paper: https://arxiv.org/abs/2411.15024 (DyCoke: token temporal merging, dynamic KV cache reduction).
Reference: https://github.com/KD-TAO/DyCoke @ dd74634 (llava/model/llava_arch.py, ``dycole_ttm``;
llava/model/language_model/modeling_qwen2.py, ``dycoke_pruning``)

At the model's input, in each group of four frames, the first stays whole, the second and third keep the tokens least
like those at the same place of the first, the fourth those least like the third, all three equally many. Nothing is
merged, whatever the name. Tokens of such a frame reach the model in order of their similarity. As released, the third
frame of the last group stays whole, and of an odd number of frames the last one leaves.

While decoding, the layer ``layer`` looks at what the newest token attends to in the layer before (mean over heads). In
the first step, and where that is not like the step before (cosine below ``alike``), this step's layers from there on
see only the visual tokens attended to most, a share 1 - ``hide`` of them, and the last; else they see all. Nothing
leaves the cache, so the saving is analytic.

Differs: the frames between keep what the budget leaves them, where the released code drops a share of each
(``merging``). If the whole frames alone are more than the budget, they keep tokens spread evenly over their grid, as
much of each; so of a picture, which is one whole frame, tokens stay as in `uniform`. Up to four frames, on which the
released code fails, follow the same rule, and none of them leaves. What a step is compared with is a sample's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signal, Signals, Step
from ivcp_eval.interface.ops import itself, place_in_group, top
from ivcp_eval.methods._at_input import Chosen, embeddings, in_output_order
from ivcp_eval.methods._clips import Clip, ClipsAtInput, cosines, in_turn

GROUP = 4
WHOLE, LEAVES = -1, -2
_STATE = "dycoke"


@dataclass
class _State:
    """What decoding remembers of a row: the attention of the last step, (C,), and what this step's layers see."""

    attention: Tensor | None = None
    visible: Tensor | None = None


@dataclass(frozen=True)
class Method(ClipsAtInput):
    """DyCoke.

    Attributes:
        merging: the share that frames between whole ones lose, whatever the budget; None: what the budget asks.
        hide: the share of the cached visual tokens that a step does not see; 0 leaves decoding alone.
        layer: decoder layer from which on it does not see them.
        alike: cosine of the attention of two steps from which on the later one sees everything.
    """

    faithfulness: ClassVar[Faithfulness] = "faithful"

    merging: float | None = None
    hide: float = 0.7
    layer: int = 3
    alike: float = 0.9

    if not TYPE_CHECKING:  # a class variable of the base

        @property
        def needs(self) -> frozenset[Signal]:
            """Every step, where steps hide something."""
            return frozenset({"step"} if self.hide else ())

    def __post_init__(self) -> None:
        """Refuse shares and layers that no run can mean."""
        if not 0 <= (self.merging or 0) <= 1 or not 0 <= self.hide <= 1 or not -1 <= self.alike <= 1 or self.layer < 1:
            raise ValueError(
                f"merging={self.merging} and hide={self.hide} must lie in 0..1, alike={self.alike} be a cosine, "
                f"layer={self.layer} 1 or more"
            )

    @property
    def exact(self) -> bool:
        """Unless the released share is asked for."""
        return self.merging is None

    def choose(self, signals: Signals, clip: Clip) -> Chosen:
        """Whole frames, and what differs between them."""
        assert signals.cut is not None
        compared = compared_with(len(clip.frames))
        counts = self._counts(clip, compared)
        spread = clip.spread([count if other < 0 else 0 for count, other in zip(counts, compared, strict=True)])
        if max(compared) < 0:
            return spread
        like = cosines(embeddings(signals, clip), clip.same_place(compared))
        rank = place_in_group(-like, clip.frame)
        limits = [count if other >= 0 else 0 for count, other in zip(counts, compared, strict=True)]
        thinned = (rank < torch.tensor(limits, device=rank.device)[clip.frame]).nonzero().flatten()
        rank[spread] = clip.place[spread]
        kept = torch.cat((spread, thinned))
        kept = kept[(clip.frame[kept] * len(clip.tokens) + rank[kept]).argsort()]
        return in_output_order(signals, kept, itself(kept, len(clip.tokens))) if signals.cut.renumber else kept

    def _counts(self, clip: Clip, compared: list[int]) -> list[int]:
        """How many tokens each frame keeps."""
        sizes, frames = clip.sizes.tolist(), range(len(compared))
        whole, leaving = ([frame for frame in frames if compared[frame] == kind] for kind in (WHOLE, LEAVES))
        between = [frame for frame in frames if compared[frame] >= 0]
        if self.merging is None:
            return in_turn(clip.budget, sizes, (whole, between, leaving))
        left = [int((1 - self.merging) * size) for size in sizes]
        return [(left if compared[t] >= 0 else sizes)[t] if compared[t] != LEAVES else 0 for t in frames]

    def attended(self, step: Step) -> Tensor | None:
        """Everything below ``layer``; from there on what the layer before attended to, where that has changed."""
        state: _State = step.memory.setdefault(_STATE, _State())
        if step.layer == self.layer:
            before, now = state.attention, step.attention().mean(dim=0)[:-1]  # the released count is one short
            state.attention = now
            visible = self.visible(now, before)
            state.visible = None if visible is None else torch.cat((visible, visible.new_ones(1))).cpu()
        return state.visible if step.layer >= self.layer else None

    def visible(self, attention: Tensor, before: Tensor | None) -> Tensor | None:
        """(C,) bool: the visual tokens that a step sees; None for all.

        Args:
            attention: (C,) of the newest token, and of the one ``before``, None in the first step.
        """
        if before is not None and float(torch.nn.functional.cosine_similarity(attention, before, dim=0)) >= self.alike:
            return None
        mask = torch.zeros_like(attention, dtype=torch.bool)
        mask[top(attention, int(len(attention) * (1 - self.hide)))] = True
        return mask


def compared_with(count: int) -> list[int]:
    """(count,) of each frame of a video the one that its tokens are compared with, `WHOLE` or `LEAVES`."""
    other = [frame - 1 if frame % 2 else WHOLE for frame in range(count)]
    for first in range(0, count - GROUP, GROUP):
        other[first + 2] = first
    if count % 2 and count > GROUP:
        other[-1] = LEAVES
    return other
