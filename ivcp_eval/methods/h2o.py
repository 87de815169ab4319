"""Keeps, in every layer's cache and head, the visual tokens that the whole prompt attends to most (heavy hitters).

Paper: https://arxiv.org/abs/2306.14048 (section 4: greedy eviction by accumulated attention).
Reference: https://github.com/FMInference/H2O @ ac75c2a (h2o_hf/utils_real_drop/modify_llama.py)

The prompt is processed whole. Then, in each layer, the attention that a token gets from every token of the prompt is
added up, and the best tokens of each head stay. The others leave the cache for good: memory is freed.

Differs: only visual tokens leave, all text stays: the prompt's, which takes the place of the recent tokens, and the
answer's, so that no visual token comes in while decoding and none has to leave then. A budget is a share of each image.
Where several query heads read one key head, their mean counts. Kernels that never hold the map cannot hand it on, so
the product of queries and keys is computed once more, a few rows at a time and without what a row cannot see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signals
from ivcp_eval.methods._evicting import Evictor

FEW, MANY = 64, 256  # rows of the attention map that are there at a time: of short prompts, and at most


@dataclass(frozen=True)
class Method(Evictor):
    """H2O."""

    faithfulness: ClassVar[Faithfulness] = "variant"

    def weigh(self, signals: Signals) -> Tensor:
        """Attention received, added up over the prompt."""
        n = signals.hidden.shape[0]
        size = min(MANY, max(FEW, n // 64))
        received = torch.zeros((), device=signals.visual.device)
        # Tokens before the first visual one see none; to ask which that is would make the host wait in every layer.
        for first in range(0, n, size):
            part = signals.attention(range(n)[first : first + size]).sum(dim=1)
            received = received if first else part.new_zeros(len(part), n)
            received[:, : part.shape[1]].add_(part)
        return received[:, signals.visual]
