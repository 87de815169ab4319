"""Prompt lookup and assisted decoding: the first forward of `generate` already holds drafted tokens after the prompt.

Pruned together with the prompt, drafts would count as text of the question, and a rejected one could not be cropped
from the cache again. So that forward is run as two: the prompt alone, then the drafts on its pruned cache, exactly as
every later round of drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ivcp_eval.interface.names import SEQUENCE, read, spellings

CONTINUES = ("input_ids", "attention_mask", "position_ids", *spellings("cache"), "use_cache", "return_dict")


def drafted(kwargs: Mapping[str, Any]) -> int:
    """How many drafted tokens end a prefill: generate asks for their logits and the prompt's last, on an empty cache.

    A bare forward without a cache never has any, whatever logits it asks for.
    """
    cache, n_logits = read(kwargs, "cache"), read(kwargs, "logits_to_keep")
    if cache is None or not isinstance(n_logits, int) or n_logits < 2 or cache.get_seq_length() > 0:
        return 0
    return n_logits - 1


class Drafts:
    """Hooks on the outer model that split such a forward, or refuse it."""

    def __init__(self, model: Any, has_images: Callable[[Mapping[str, Any]], bool], refused: bool = False) -> None:
        self.model, self.has_images, self.refused = model, has_images, refused
        self._logits: torch.Tensor | None = None  # of the prompt's last token
        self._splitting = False

    def attach(self) -> list[Any]:
        """Register the hooks; returns their handles."""
        return [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        n = 0 if self._splitting else drafted(kwargs)
        if not n or read(kwargs, "input_ids") is None or not self.has_images(kwargs):
            return None
        if self.refused:
            raise ValueError(
                "prompt lookup and assisted decoding check several tokens in one forward, which a method that masks "
                "single steps cannot follow; decode without drafts"
            )
        prompt = {key: value[..., :-n] if _is(key, value) else value for key, value in kwargs.items()}
        self._splitting = True
        try:
            self._logits = self.model(*args, **{**prompt, "logits_to_keep": 1, "return_dict": True}).logits
        finally:
            self._splitting = False
        rest = {key: kwargs[key] for key in CONTINUES if key in kwargs}
        rest |= {key: rest[key][..., -n:] for key in ("input_ids", "position_ids") if _is(key, rest.get(key))}
        return args, {**rest, "logits_to_keep": n}

    def _after(self, _module: Any, _args: Any, output: Any) -> Any:
        if self._splitting or self._logits is None:
            return None
        logits, self._logits = self._logits, None
        if output is not None:  # else the forward raised
            output.logits = torch.cat([logits, output.logits], dim=1)
        return output


def _is(key: str, value: Any) -> bool:
    return key in SEQUENCE and isinstance(value, torch.Tensor)
