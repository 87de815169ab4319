"""FlashAttention-2's two functions in plain torch, so that transformers' own flash branch runs on a CPU."""

from __future__ import annotations

import functools
import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """(B, q, H, D), (B, k, G, D), (B, k, G, D) -> (B, q, H, D); causal means aligned at the bottom right."""
    assert dropout_p == 0
    groups = q.shape[2] // k.shape[2]
    k, v = (states.repeat_interleave(groups, dim=2) for states in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if causal:
        allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        logits = logits.masked_fill(~allowed, -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Packed sequences (total, H, D), each for itself."""
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    pairs = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (q0, q1), (k0, k1) in pairs:
        assert q1 - q0 <= max_seqlen_q
        assert k1 - k0 <= max_seqlen_k
        if q1 > q0:
            args = (q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], dropout_p, softmax_scale, causal)
            out[q0:q1] = flash_attn_func(*args)[0]
    return out


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let transformers import the stand-in as ``flash_attn`` for the duration of a test; returns the calls made."""
    from transformers import modeling_flash_attention_utils as stock

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.__spec__ = ModuleSpec("flash_attn", None)  # looked up by transformers
    calls: list[str] = []

    def counted(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    members: dict[str, Any] = {
        "flash_attn_func": counted(flash_attn_func),
        "flash_attn_varlen_func": counted(flash_attn_varlen_func),
        "flash_attn_with_kvcache": None,
    }
    for name, member in members.items():
        setattr(package, name, member)
    padding.pad_input, padding.unpad_input = stock._pad_input, stock._unpad_input  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(stock, "is_flash_attn_2_available", lambda: True)
    for name in vars(stock).copy():
        if name.startswith("_flash") or name in ("_loaded_implementation", "_pad_fn", "_unpad_fn"):
            monkeypatch.setattr(stock, name, vars(stock)[name])  # what it caches is put back afterwards
    monkeypatch.setattr(stock, "_loaded_implementation", None)
    return calls
