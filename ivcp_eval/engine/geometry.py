"""Rows of unequal length: which prompt columns are alive, and the tensors that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivcp_eval.interface.ops import to_device


@dataclass(frozen=True)
class Rows:
    """The alive prompt columns of each batch row, on the host.

    Attributes:
        columns: one increasing int64 CPU vector per row; no padding.
    """

    columns: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        """Columns of the padded batch: those of the longest row."""
        return max((row.numel() for row in self.columns), default=0)

    @property
    def padded(self) -> bool:
        """Whether any row is shorter than the longest."""
        return any(row.numel() != self.length for row in self.columns)

    def matrix(self) -> Tensor:
        """(B, length) int64 on CPU, padded on the left with -1."""
        out = torch.full((len(self.columns), self.length), -1, dtype=torch.int64)
        for i, row in enumerate(self.columns):
            out[i, self.length - row.numel() :] = row
        return out

    def slots_in(self, earlier: Tensor) -> Tensor:
        """(B, length): where each alive column stands in ``earlier`` (B, m), a `matrix` it is a subset of; -1 pads."""
        out = torch.full((len(self.columns), self.length), -1, dtype=torch.int64)
        for i, row in enumerate(self.columns):
            # -1 pads sort before every column, so the padded row is still sorted.
            out[i, self.length - row.numel() :] = torch.searchsorted(earlier[i].contiguous(), row)
        return out


def is_member(values: Tensor, members: Tensor) -> Tensor:
    """(n,) bool: which of the increasing ``values`` are among the increasing, non-empty ``members``.

    `torch.isin` sorts both first, which costs milliseconds per image of 16,000 tokens.
    """
    at = torch.searchsorted(members, values).clamp_max_(members.numel() - 1)
    return members[at] == values


def take_sequence(states: Tensor, slots: Tensor) -> Tensor:
    """Gather along the sequence axis: (..., B, S, F) and slots (B, n) -> (..., B, n, F); -1 copies slot 0.

    A batch axis of size 1 (position embeddings shared by all rows) is expanded. The sequence axis is -2.
    """
    index = to_device(slots.clamp_min(0), states.device)
    states = states.expand(*states.shape[:-3], index.shape[0], *states.shape[-2:])
    index = index[..., None].expand(*states.shape[:-3], *index.shape, states.shape[-1])
    return states.gather(-2, index)


def take_position_embeddings(embeddings: Any, slots: Tensor) -> Any:
    """`take_sequence` on (cos, sin), or on DeepSeek-V2's single complex tensor."""
    if isinstance(embeddings, torch.Tensor):
        return take_sequence(embeddings, slots)
    return tuple(take_sequence(part, slots) for part in embeddings)


def row_position_embeddings(embeddings: Any, row: int, config: Any, device: torch.device) -> Any:
    """The position embeddings of one row, batch axis kept: (1, n, R) each; a batch axis of 1 serves every row.

    They are made once, on the device of the first layer, for layers that may lie on others: here they come to theirs.

    Before transformers 5.17, Qwen2-VL and Qwen2.5-VL left the three axes of M-RoPE apart, (3, B, n, R), for the
    attention to join by ``mrope_section``; they are joined here.
    """
    if isinstance(embeddings, torch.Tensor):
        return embeddings.narrow(-3, min(row, embeddings.shape[-3] - 1), 1).to(device)
    parts = tuple(part.narrow(-3, min(row, part.shape[-3] - 1), 1).to(device) for part in embeddings)
    if parts[0].ndim == 3:
        return parts
    sections = list(config.rope_parameters["mrope_section"]) * 2
    return tuple(
        torch.cat([chunk[i % 3] for i, chunk in enumerate(part.split(sections, dim=-1))], dim=-1) for part in parts
    )


def attention_mask(
    key_columns: Tensor,
    query_length: int,
    *,
    implementation: str,
    dtype: torch.dtype,
    allowed: Tensor | None = None,
) -> Tensor:
    """The mask a stock attention of ``implementation`` expects, for keys that stand at ``key_columns``.

    Args:
        key_columns: (B, m) prompt column of each key, -1 for padding; the last ``query_length`` are the queries'.
        query_length: q.
        implementation: ``config._attn_implementation``.
        dtype: of the hidden states; eager attention adds a float mask.
        allowed: (B, m) bool of keys the caller's own 2-D mask admits.

    Returns:
        Flash attention: (B, m) bool of valid keys (causality is the kernel's). sdpa: (B, 1, q, m) bool.
        eager: (B, 1, q, m) float with the dtype's minimum where forbidden.
    """
    valid = key_columns >= 0 if allowed is None else (key_columns >= 0) & allowed
    if "flash" in implementation:
        return valid
    queries = key_columns[:, -query_length:]
    mask = valid[:, None, :] & (key_columns[:, None, :] <= queries[:, :, None])
    # A padding query attends to itself: a row with no key at all is NaN, and NaN values poison even masked keys.
    itself = torch.zeros_like(mask)
    itself[:, :, -query_length:] = torch.eye(query_length, dtype=torch.bool, device=mask.device)
    mask = (mask | (itself & (queries < 0)[:, :, None]))[:, None]
    return mask if implementation == "sdpa" else as_float(mask, dtype)


def as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a bool mask adds to attention's logits: 0, or the dtype's minimum where it forbids."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def biased(mask: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of sdpa or eager attention with ``bias`` (n,) added for every key; ``mask`` None is causal."""
    mask = _whole(mask, bias)
    return (as_float(mask, dtype) if mask.dtype == torch.bool else mask) + bias.to(dtype)


def restricted(mask: Tensor | None, seen: Tensor) -> Tensor:
    """A mask of sdpa or eager attention that also forbids what ``seen`` (B, H or 1, n, n) bool does; None is causal."""
    mask = _whole(mask, seen)
    seen = to_device(seen, mask.device)
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _whole(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask itself, or the causal one that its absence stands for, of as many keys as ``like`` has."""
    if mask is not None:
        return mask
    columns = torch.arange(like.shape[-1], device=like.device)[None]
    return attention_mask(columns, like.shape[-1], implementation="sdpa", dtype=torch.bool)
