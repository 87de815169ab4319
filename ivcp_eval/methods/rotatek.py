"""Compresses the channels of cached visual keys: query-weighted principal axes, all tokens stay.

Paper: https://arxiv.org/abs/2605.19218 (rotation-aligned key channel pruning).
Reference: https://github.com/beomseokg/rotatek @ 18327c0 (kv_pruning_utils.py, ``update_rotatek``)

After the prefill, per layer and key head: covariance C of the centred visual keys (RoPE applied), channels weighted by
the norm of the last 32 queries (mean over the group, floored at 1/1000 of the median), a ridge of 1e-4 of the mean
diagonal; R holds the first axes. A real implementation stores K R, R and the mean's remainder and decodes with
(q R)(K R)^T + q (mu - mu R R^T). Exactly these logits come from keys K R R^T + mu - mu R R^T, which is what is put
into the cache here: accuracy is measured, memory and speed are not. The share of key memory that would be saved is
reported as analytic (`key_share`).

The retention ratio is the share of key channels that are kept; the paper's setting is 0.25.

Differs: exact eigenvectors instead of five power iterations (the released code offers both; the iterations are its
default). Mean, axes and products
are float32 and the keys are rounded to the cache's precision once, where the released code rounds each part. All images
of a row share one rotation, as in the released code; text between them stays whole (there it is part of the span).
Every visual token is compressed; the released code leaves the last one whole, its span being one short.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import CachedKeys, Faithfulness
from ivcp_eval.methods._uncut import ChannelPruner, channels_kept


@dataclass(frozen=True)
class Method(ChannelPruner):
    """RotateK.

    Attributes:
        query_aware: weight channels by the queries; False is the paper's ablation.
    """

    faithfulness: ClassVar[Faithfulness] = "faithful"

    query_aware: bool = True

    def edit_keys(self, cached: CachedKeys) -> Tensor:
        """The keys whose logits equal those of the compressed form."""
        key = cached.key.float()
        n_heads, _, size = key.shape
        kept = channels_kept(size, cached.ratio)
        mean = key.mean(dim=1, keepdim=True)
        centred = key - mean
        covariance = centred.transpose(1, 2) @ centred
        if self.query_aware:
            covariance = weigh(covariance, cached.query.float().unflatten(0, (n_heads, -1)).mean(dim=1))
        axes = torch.linalg.eigh(covariance).eigenvectors[:, :, size - kept :]
        return mean + centred @ axes @ axes.transpose(1, 2)


def weigh(covariance: Tensor, query: Tensor) -> Tensor:
    """(G, D, D) covariance of keys whose channels are scaled by the norm of (G, W, D) queries, with a ridge."""
    norm = query.norm(dim=1)
    norm = torch.maximum(norm, 1e-3 * norm.median(dim=1, keepdim=True).values)
    weighted = covariance * norm[:, :, None] * norm[:, None, :]
    ridge = 1e-4 * weighted.diagonal(dim1=1, dim2=2).abs().mean(dim=1).clamp_min(1e-6)
    return weighted + ridge[:, None, None] * torch.eye(covariance.shape[1], device=covariance.device)
