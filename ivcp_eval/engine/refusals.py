"""What a prune block cannot do, refused in words before it can go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.engine.cache import check_cache

if TYPE_CHECKING:
    from torch import nn

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


def refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError for a compiled model, whose code ignores hooks that are registered later."""
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        raise ValueError("the model is compiled, so pruning hooks would be ignored; pass it without torch.compile")


def refuse_labels(_module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
    """A forward pre-hook of the outer model: raise ValueError where a loss is asked for."""
    if kwargs.get("labels") is not None:
        raise ValueError("got labels: a pruned prefill has fewer logits than tokens. Leave the prune block to train.")


def refuse_unsupported(text_model: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for a forward of the text model that the hooks cannot serve, given its keyword arguments."""
    if torch.compiler.is_compiling():
        raise ValueError("torch.compile cannot trace pruning hooks; compile outside the prune block or not at all")
    if text_model.training:
        raise ValueError("the model is in training mode; call model.eval() first (pruning has no backward contract)")
    implementation = text_model.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is not supported; use one of {', '.join(IMPLEMENTATIONS)}"
        )
    check_cache(kwargs.get("past_key_values"))  # first: a static cache comes with a mask of another kind
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        kind = type(mask).__name__ if not isinstance(mask, torch.Tensor) else f"{mask.ndim}-dimensional"
        raise ValueError(f"got a {kind} attention_mask; pass the 2-D padding mask of the tokenizer")
