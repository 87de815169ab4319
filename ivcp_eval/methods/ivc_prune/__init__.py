"""Keeps the implicit visual coordinates that RoPE creates, a few semantic seeds, and the foreground of the question.

Paper: https://arxiv.org/abs/2602.03060 (Algorithm 1: V(m), U(m), semantic seeds, contextual refinement).
Reference: https://github.com/FireRedTeam/IVC-Prune @ 03afd9c

One cut in the middle of the decoder; the same tokens leave the KV cache of every layer; position ids stay.

The general rule, for any ratio, any number of images, text on both sides:

* Budget per image, ``round(ratio * N)`` of its N tokens: every image must stay usable, and the total is exact.
* IVC per view of an image (each tile, the thumbnail or overview; most families have one view): the best tokens by the
  mean of cos (real axis) and of sin (imaginary axis) of their rotary angles, each ``ivc`` of the view's tokens but at
  most ``ivc_share`` of its part of the budget. With the published ivc=0.1 and ivc_share=0.2 that is the released set
  at ratio 0.5 and above, and the same proportions below, where the released code overruns its budget. Per view,
  because positions run on from tile to tile: the best of the whole image would leave most tiles without any.
* Queries are the text tokens after the last image: in a causal model only they have seen every image *and* the whole
  question, wherever the question stands. The closing marker is no query.
* Seeds: ``seeds`` N of the image's tokens that the queries' values match best (softmax over that image, mean over
  heads and queries); then text and seeds together rank the rest, which fills the budget.

Differs: seeds are the released code's max(1, round(0.01 N)), the paper's are ceil(0.01 N). The released code leaves one
more token out of the queries, the one after the closing marker. Algorithm 1 joins an IVC set and a foreground set of
fixed sizes; the released code fills up to the budget instead, and so do we. The paper's V(m) sums over one axis; on
M-RoPE the released code averages all three axes over the full spectrum, and so do we. Scores are float32 (released:
bfloat16, where a third of the IVC set is ties), and of equal ones the lower index stays; there it is whatever the
device's top-k returns.
``preset="official"`` reproduces the released code of each family with its quirks instead; see `official.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, Image, ModelFacts, Selection, Signal, Signals
from ivcp_eval.interface.ops import coordinate_set, coordinate_shares, filled_up, to_device, top
from ivcp_eval.methods.ivc_prune.similarity import value_similarity

PUBLISHED_LAYER = {
    ("qwen2_5_vl", 28): 16,  # 7B
    ("qwen2_5_vl", 36): 22,  # 3B
    ("llava", 32): 16,
    ("internvl", 32): 16,
    ("deepseek_vl2", 27): 17,
}


@dataclass(frozen=True)
class Method(AbstractMethod):
    """IVC-Prune.

    Attributes:
        layer: decoder layer whose input is cut; None takes the released layer of the model, elsewhere 4/7 of the depth
            (16 of 28). Values come from the layer before it.
        ivc: share of an image's tokens kept for each of the two coordinate scores; 0 switches the part off.
        ivc_share: upper bound of each, as a share of the image's budget; above 0.5 is as 0.5, since both must fit.
        seeds: share of an image's tokens that become semantic seeds (at least one); 0 switches them off.
        foreground: fill by the value similarity to the question; False fills at random (an ablation).
        preset: "general", or "official" for the released code of the family.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"value"})
    faithfulness: ClassVar[Faithfulness] = "faithful"

    layer: int | None = None
    ivc: float = 0.1
    ivc_share: float = 0.2
    seeds: float = 0.01
    foreground: bool = True
    preset: Literal["general", "official"] = "general"

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        if self.preset not in ("general", "official"):
            raise ValueError(f"preset {self.preset!r} is unknown; use 'general' or 'official'")
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"layer {self.layer} has no layer before it to take values from; use 1 or more")
        for name in ("ivc", "ivc_share", "seeds"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside 0..1")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut for all layers' caches (the official LLaVA and DeepSeek code leaves layer 0's whole)."""
        layer = self.layer
        if layer is None:
            layer = PUBLISHED_LAYER.get((model.family, model.n_layers), round(model.n_layers * 4 / 7))
            layer = max(layer, model.first_cut, 1)
        if self.preset == "official":
            from ivcp_eval.methods.ivc_prune.official import cut

            return (cut(model, layer, ratio),)
        return (Cut(layer, ratio),)

    def select(self, signals: Signals) -> Selection:
        """Algorithm 1 on every image of the row."""
        if self.preset == "official":
            from ivcp_eval.methods.ivc_prune.official import select

            return select(signals)
        cos, sin = (part.mean(dim=(0, 2)) for part in signals.rope())  # (n,)
        kept = [self._select_image(signals, image, cos, sin) for image in signals.images]
        return Selection(torch.cat(kept).sort().values)

    def _select_image(self, signals: Signals, image: Image, cos: Tensor, sin: Tensor) -> Tensor:
        at = signals.visual[image.tokens]  # (N,) among the row's tokens
        n, budget = at.numel(), image.budget
        kept = coordinate_set(cos[at], sin[at], image, self.ivc, self.ivc_share)
        if self.foreground:
            n_seeds = max(1, round(self.seeds * image.n_prompt)) if self.seeds else 0
            # Both scores may choose the same tokens; how many only the device knows, and most budgets have room anyway.
            if n_seeds > budget - 2 * sum(coordinate_shares(image, self.ivc, self.ivc_share)):
                n_seeds = min(n_seeds, budget - int(kept.sum()))
            assert signals.value is not None
            seeds = top(value_similarity(signals.value, signals.question, at), n_seeds)
            kept[seeds] = True
            fill = value_similarity(signals.value, torch.cat((signals.question, at[seeds])), at)
        else:
            fill = to_device(torch.rand(n, generator=signals.generator), at.device)
        return image.tokens[filled_up(fill, kept, budget)]
