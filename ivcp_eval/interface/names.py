"""How transformers names what the hooks read and write. Nothing else in the engine spells the name of the cache.

Releases rename arguments: 5.24 calls the cache ``cache``, earlier ones ``past_key_values``, and callers may use either.
A hook that asks for a name that is gone sees None and lets a wrong pass through, so `check_names` refuses a model whose
forwards do not take, by name, everything in `READ`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from transformers.modeling_outputs import BaseModelOutputWithPast

TESTED = "5.14 to 5.24"
SPELLINGS: dict[str, tuple[str, ...]] = {"cache": ("cache", "past_key_values")}
"""Names with more than one spelling, newest first; every other name is its own spelling."""
SEQUENCE = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Inputs with one entry per token, on their last axis."""
READ: dict[str, tuple[str, ...]] = {
    "model": ("input_ids", "attention_mask", "position_ids", "labels", "logits_to_keep"),
    "text model": ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache"),
    "decoder layer": ("attention_mask", "position_ids", "position_embeddings", "cache"),
    "rotary embedding": ("position_ids",),
}
"""What the hooks read or write of each kind of module."""


def spellings(name: str) -> tuple[str, ...]:
    """Every spelling of ``name``, newest first."""
    return SPELLINGS.get(name, (name,))


@functools.cache
def spelling(name: str) -> str:
    """The spelling of the installed release, as its model outputs have it."""
    fields = {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
    return next((known for known in spellings(name) if known in fields), name)


def read(kwargs: Mapping[str, Any], name: str) -> Any:
    """The argument ``name`` under any of its spellings; None where it is not given."""
    return next((kwargs[known] for known in spellings(name) if kwargs.get(known) is not None), None)


def write(kwargs: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with other values, each under the spelling that is there already, else that of the release."""
    changed = dict(kwargs)
    for name, value in values.items():
        changed[next((known for known in spellings(name) if known in kwargs), spelling(name))] = value
    return changed


def output_cache(output: Any) -> Any:
    """The cache in a model's output; None where there is none."""
    return getattr(output, spelling("cache"), None)


def check_names(model: Any, text_model: Any) -> None:
    """Raise ValueError unless every forward takes what the hooks read; costs next to nothing for a class seen before.

    Args:
        model: the outer model. text_model: its decoder, with ``layers`` and ``rotary_emb``.
    """
    layers = (type(layer) for layer in text_model.layers)
    _check((type(model), type(text_model), type(text_model.rotary_emb), *dict.fromkeys(layers)))


@functools.cache
def _check(classes: tuple[type, ...]) -> None:
    model, text_model, rotary, *layers = classes
    kinds = [("model", model), ("text model", text_model), ("rotary embedding", rotary)]
    for kind, module in [*kinds, *(("decoder layer", layer) for layer in layers)]:
        taken = inspect.signature(module.forward).parameters  # type: ignore[attr-defined] # of nn.Module
        missing = [name for name in READ[kind] if not any(known in taken for known in spellings(name))]
        if missing:
            raise ValueError(
                f"{module.__name__}.forward of transformers {transformers.__version__} takes no "
                f"{', '.join(missing)}, which pruning reads and replaces there; it would run wrong without a word. "
                f"Install a tested release of transformers ({TESTED})."
            )
