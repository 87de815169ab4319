"""Drops visual tokens in stages down the decoder, each time those that the last token attends to least.

Paper: https://arxiv.org/abs/2410.17247 (section 3.2: stages, ratio lambda, similarity of the last instruction token).
Reference: https://github.com/Cooperx521/PyramidDrop @ 6444f30 (llava/model/modeling_llama_pdrop.py)

Three cuts at 1/4, 1/2 and 3/4 of the depth (8, 16, 24 of 32) keep lambda, lambda^2 and lambda^3 of the prompt's
tokens; the published lambda is 0.5, here it is the cube root of the retention ratio, which is what is left at the
end. Each stage ranks the hidden states that enter it with its own first layer's norm, queries and keys, and each
has its own cache length.

Survivors are numbered anew in every stage, as in the released code. That code knows LLaVA only: on M-RoPE, whose
positions are places in the image, they keep theirs.

Differs: counts are rounded, not truncated. Each image has its own budget. Scores are float32. Layers are published for
32 of them only, other depths are scaled; counts for lambda 0.5 only, any other ratio's cube root is lambda.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ivcp_eval.interface import AbstractScorer, Cut, Faithfulness, ModelFacts, Signals
from ivcp_eval.interface.ops import last_token, mean_attention


@dataclass(frozen=True)
class Method(AbstractScorer):
    """PyramidDrop.

    Attributes:
        depths: where the stages begin, as shares of the decoder's depth, increasing.
        renumber: number the survivors 0..n-1 in every stage; None as released (not on M-RoPE). It changes which
            tokens later stages keep: False is a variant.
    """

    faithfulness: ClassVar[Faithfulness] = "faithful"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {"renumber": (None, True)}

    depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    renumber: bool | None = None

    def __post_init__(self) -> None:
        """Refuse depths that are no places in a decoder."""
        object.__setattr__(self, "depths", tuple(self.depths))
        inside = all(0 <= depth < 1 for depth in self.depths)
        if not self.depths or not inside or list(self.depths) != sorted(set(self.depths)):
            raise ValueError(f"depths {self.depths} must be increasing shares of the decoder's depth in [0, 1)")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut per stage; stages that fall on the same layer of a shallow model are one."""
        renumber = model.renumbers(self.renumber)
        layers = sorted({max(model.first_cut, round(depth * model.n_layers)) for depth in self.depths})
        layers = [layer for layer in layers if layer < model.n_layers]
        return tuple(
            Cut(layer, ratio ** ((stage + 1) / len(layers)), cache="from_cut", renumber=renumber)
            for stage, layer in enumerate(layers)
        )

    def score(self, signals: Signals) -> Tensor:
        """Attention of the last token in the layer that is entered, mean over heads."""
        return mean_attention(signals, last_token(signals), entering=True)
