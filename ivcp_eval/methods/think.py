"""Keeps the channels of cached visual keys that queries and keys make heavy; all tokens stay.

Paper: https://arxiv.org/abs/2407.21018 (query-driven channel pruning, ||Q_d|| ||K_d||).
Reference: https://github.com/SalesforceAIResearch/ThinK @ d200577 (ThinK_eager/src/kv_pruning_utils.py), and for visual
tokens https://github.com/beomseokg/rotatek @ c35deae (rotatek/baselines/think.py)

After the prefill, per layer and key head: a channel weighs the mean square of the last 32 queries (mean over the group)
times the mean square of the visual keys (RoPE applied); the lightest channels go, in the queries too. Exactly these
logits come from keys with zeros there, which is what is put into the cache: accuracy is measured, memory and speed are
not. The share of key memory that would be saved is reported as analytic (`key_share`).

The retention ratio is the share of key channels that are kept. It is the baseline of `rotatek`, which turns the keys to
their own axes first.

Differs: channels are pruned for visual tokens only, as in the second reference; the first prunes text too, but the last
tokens. All images of a row share one choice of channels. Weights are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import CachedKeys, Faithfulness
from ivcp_eval.interface.ops import ranking
from ivcp_eval.methods._uncut import ChannelPruner, channels_kept


@dataclass(frozen=True)
class Method(ChannelPruner):
    """ThinK."""

    faithfulness: ClassVar[Faithfulness] = "faithful"

    def edit_keys(self, cached: CachedKeys) -> Tensor:
        """The keys with zeros in the channels that go."""
        n_heads, _, size = cached.key.shape
        kept = channels_kept(size, cached.ratio)
        queries = cached.query.float().square().mean(dim=1).unflatten(0, (n_heads, -1)).mean(dim=1)  # (G, D)
        heavy = ranking(queries * cached.key.float().square().mean(dim=1))[:, :kept]
        stays = torch.zeros(n_heads, size, dtype=torch.bool, device=cached.key.device).scatter(1, heavy, value=True)
        return cached.key * stays[:, None]
