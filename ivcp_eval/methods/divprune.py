"""Keeps the subset of visual tokens that is most diverse: farthest-point selection by cosine distance.

Paper: https://arxiv.org/abs/2503.02175 (algorithm 1: greedy max-min diversity).
Reference: https://github.com/vbdi/divprune @ 799e2d9 (LLaVA/llava/model/llava_arch.py)

The first token is the one whose nearest neighbour is farthest; each next one is farthest from all chosen so far.

Differs: each image has its own budget and its own distances. A chosen token is never chosen again (the released code
may, among duplicates). Distances are float32, not the model's precision. Survivors are numbered anew, as happens in
the released code, whose language model gets the shorter embeddings; on M-RoPE, whose positions are places in the
image, they keep theirs. Families that add visual features in their first layers are cut after these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, ModelFacts, Selection, Signals
from ivcp_eval.methods._greedy import farthest_points


@dataclass(frozen=True)
class Method(AbstractMethod):
    """DivPrune.

    Attributes:
        layer: decoder layer whose input is cut; None is the first that can be cut, usually the model's input.
        renumber: number the survivors 0..n-1; None as released (not on M-RoPE), False is a variant.
    """

    faithfulness: ClassVar[Faithfulness] = "faithful"
    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {"renumber": (None, True)}

    layer: int | None = None
    renumber: bool | None = None

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut for every layer's cache."""
        layer = model.first_cut if self.layer is None else self.layer
        return (Cut(layer, ratio, renumber=model.renumbers(self.renumber)),)

    def select(self, signals: Signals) -> Selection:
        """Farthest points of every image."""
        kept = []
        for image in signals.images:
            states = signals.hidden[signals.visual[image.tokens]]
            kept.append(image.tokens[farthest_points(states, image.budget)])
        return Selection(torch.cat(kept).sort().values)
