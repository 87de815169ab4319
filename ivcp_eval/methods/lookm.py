"""Keeps H2O's visual tokens in every layer's cache and merges keys and values of the others into those most like them.

Paper: https://arxiv.org/abs/2406.18139 (LOOK-M: text-prior eviction, pivotal merging of what leaves).
Reference: https://github.com/SUSTechBruce/LOOK-M @ ecf0f51 (LLaVA-mix_merge_v1, ``TextPivotMerge_LayerWise``)

The prompt is processed whole. In each layer and head the text stays (the text prior) and the visual tokens that got the
most attention from the whole prompt. Each of the others goes to the kept one whose cached key has the largest cosine to
its own, in keys and in values. A kept token becomes the mean of itself and, for each that came, of the middle between
the two (``merging="pivot"``) or of that token itself ("average"; "weighted" by the cosine). Memory is freed.

Differs: only visual tokens leave, and they are merged into visual tokens only; the released code counts text in its
budget and may merge into text. All text stays, which takes the place of the recent tokens. A budget is a share of each
image. Where several query heads read one key head, their mean counts. Scores cost what they cost in `h2o`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Selection, Signals
from ivcp_eval.interface.ops import nearest_of, sparse_weights, unit_rows
from ivcp_eval.methods import h2o


@dataclass(frozen=True)
class Method(h2o.Method):
    """LOOK-M.

    Attributes:
        merging: "pivot" as released by default, "average" or "weighted".
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    merging: Literal["pivot", "average", "weighted"] = "pivot"

    def __post_init__(self) -> None:
        """Refuse a word that no run can mean."""
        super().__post_init__()
        if self.merging not in ("pivot", "average", "weighted"):
            raise ValueError(f"merging={self.merging!r} is unknown; use one of pivot, average, weighted")

    def select(self, signals: Signals) -> Selection:
        """H2O's tokens, and how the others are merged into them."""
        assert signals.key is not None
        assert signals.rotate is not None
        chosen = super().select(signals)
        keys = signals.rotate(signals.key)[:, signals.visual]
        if self.heads == "shared":
            keys = keys.transpose(0, 1).flatten(1)[None]
        keep = torch.atleast_2d(chosen.keep)
        parts = [self.weights(own, kept) for own, kept in zip(keys, keep, strict=True)]
        merge = parts[0] if self.heads == "shared" else torch.stack(parts)
        return replace(chosen, merge=merge)

    def weights(self, key: Tensor, keep: Tensor) -> Tensor:
        """(K, V) sparse weights of one head, by cached keys (V, D); ``keep`` (K,) stay."""
        n, k = len(key), len(keep)
        gone = torch.ones(n, dtype=torch.bool, device=key.device)
        gone[keep] = False
        leaving = gone.nonzero().flatten()
        into = nearest_of(key[leaving], key[keep])
        came = torch.bincount(into, minlength=k).float()
        share = 1 / (1 + came)
        given = torch.ones_like(leaving, dtype=torch.float32)
        if self.merging == "pivot":
            given = given / 2
        elif self.merging == "weighted":
            unit = unit_rows(key)
            given = (unit[leaving] * unit[keep[into]]).sum(dim=1)
        own = 1 + came / 2 if self.merging == "pivot" else torch.ones_like(came)
        rows = torch.cat((torch.arange(k, device=key.device), into))
        columns = torch.cat((keep, leaving))
        return sparse_weights(rows, columns, torch.cat((own * share, given * share[into])), (k, n))
