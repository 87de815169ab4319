"""Keeps, in every layer's cache and head, the visual tokens that the whole prompt attends to most (heavy hitters).

Paper: https://arxiv.org/abs/2306.14048 (section 4: greedy eviction by accumulated attention).
Reference: https://github.com/FMInference/H2O @ ac75c2a (h2o_hf/utils_real_drop/modify_llama.py)

The prompt is processed whole. Then, in each layer, the attention that a token gets from every token of the prompt is
added up, and the best tokens of each head stay. The others leave the cache for good: memory is freed.

Differs: only visual tokens leave, all text stays: the prompt's, which takes the place of the recent tokens, and the
answer's, so that no visual token comes in while decoding and none has to leave then. A budget is a share of each image.
Where several query heads read one key head, their mean counts. Adding up costs about as many operations as the
attention of the prefill itself, in every implementation: kernels that never hold the map cannot hand it on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signals
from ivcp_eval.methods._evicting import Evictor

ROWS = 64  # of the attention map that are there at a time


@dataclass(frozen=True)
class Method(Evictor):
    """H2O."""

    faithfulness: ClassVar[Faithfulness] = "variant"

    def weigh(self, signals: Signals) -> Tensor:
        """Attention received, added up over the prompt."""
        device = signals.visual.device
        # Tokens before the first visual one see none; to ask which that is would make the host wait in every layer.
        rows = torch.arange(signals.hidden.shape[0], device=device)
        return sum(
            (signals.attention(part)[:, :, signals.visual].sum(dim=1) for part in rows.split(ROWS)),
            start=torch.zeros((), device=device),
        )
