"""What a prune block cannot do, refused in words before it can go wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.engine.cache import check_cache
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.names import read
from ivcp_eval.interface.variants import ATTENTIONS

if TYPE_CHECKING:
    from torch import nn


def unwrapped(model: Any) -> Any:
    """The transformers model itself: PEFT puts its adapters into the layers of the model that it wraps.

    Raises:
        ValueError: a wrapper that splits a batch over replicas, or adapters that put virtual tokens before the prompt.
    """
    if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"got a model inside {type(model).__name__}, whose replicas do not carry pruning hooks; pass model.module"
        )
    if not callable(getattr(model, "get_base_model", None)):
        return model
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "got a PEFT model that puts virtual tokens before the prompt (prompt or prefix tuning); only adapters "
            "inside the layers (LoRA and the like) can be pruned"
        )
    return model.get_base_model()


def refuse_compiled(model: nn.Module) -> None:
    """Raise ValueError for a compiled model, whose code ignores hooks that are registered later."""
    # Not `model.modules()`: in deep models that is most of what entering a block costs.
    pending, compiled = [model], hasattr(model, "_orig_mod")
    while pending and not compiled:
        module = pending.pop()
        compiled = module._compiled_call_impl is not None
        pending += [child for child in module._modules.values() if child is not None]
    if compiled:
        raise ValueError("the model is compiled, so pruning hooks would be ignored; pass it without torch.compile")


def refuse_labels(_module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
    """A forward pre-hook of the outer model: raise ValueError where a loss is asked for."""
    if read(kwargs, "labels") is not None:
        raise ValueError("got labels: a pruned prefill has fewer logits than tokens. Leave the prune block to train.")


def refuse_videos(inputs: Mapping[str, Any], reason: str) -> None:
    """Raise ValueError where the inputs of the multimodal model hold a video, as frames or already encoded.

    `generate` encodes videos, as it does images, before the forward (transformers 5.20 and later).

    Args:
        reason: why the family's videos cannot be pruned (`AbstractAdapter.no_videos`); empty where they can.
    """
    given = [name for name, value in inputs.items() if "video" in name and value is not None]
    if reason and (given or (read(inputs, "mm_encoder_outputs") or {}).get("video") is not None):
        raise ValueError(
            f"got a video, whose tokens would count as text: {reason}. Pass its frames as images and say which belong "
            "together, prune(..., frames=[[Frame(0, 0), Frame(0, 1), ...]]), or leave the prune block."
        )


def refuse_own_pruning(config: Any) -> None:
    """Raise ValueError for a model that prunes its own videos: what it answers unpruned is no baseline."""
    share = getattr(config, "video_pruning_rate", None)
    if share:
        raise ValueError(
            f"{getattr(config, 'model_type', 'the model')} prunes its own videos (config.video_pruning_rate={share}), "
            "so that every row, the baseline first, would be pruned twice; load it with video_pruning_rate=0"
        )


def refuse_other_kernels(text_model: Any, why: str) -> None:
    """Raise Unsupported unless the attention of the text model takes a mask of pairs of tokens; ``why`` it must."""
    implementation = text_model.config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise Unsupported(
            f"{why}, which attention {implementation!r} takes no mask for; load the model with sdpa or eager"
        )


def refuse_chunks(_model: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for a call of ``generate`` that prefills in chunks: a cut would not see the later ones."""
    # What the call leaves open, `generate` takes from the model.
    configs = (kwargs.get("generation_config"), _model.generation_config)
    sizes = [kwargs.get("prefill_chunk_size"), *(getattr(config, "prefill_chunk_size", None) for config in configs)]
    size = next((size for size in sizes if size is not None), None)
    if size is not None:
        raise ValueError(
            f"Chunked prefill (prefill_chunk_size={size}) cannot be pruned: the choice is made in one forward of the "
            "whole prompt. Leave prefill_chunk_size unset."
        )


def refuse_unsupported(text_model: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError for a forward of the text model that the hooks cannot serve, given its keyword arguments."""
    if torch.compiler.is_compiling():
        raise ValueError("torch.compile cannot trace pruning hooks; compile outside the prune block or not at all")
    if text_model.training:
        raise ValueError("the model is in training mode; call model.eval() first (pruning has no backward contract)")
    implementation = text_model.config._attn_implementation
    if implementation not in ATTENTIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is not supported; use one of {', '.join(ATTENTIONS)}"
        )
    check_cache(read(kwargs, "cache"))  # first: a static cache comes with a mask of another kind
    mask = read(kwargs, "attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.ndim != 2):
        kind = type(mask).__name__ if not isinstance(mask, torch.Tensor) else f"{mask.ndim}-dimensional"
        raise ValueError(f"got a {kind} attention_mask; pass the 2-D padding mask of the tokenizer")
