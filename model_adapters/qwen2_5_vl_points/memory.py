"""What a model has been shown, as keys and values of both sets of tokens, of which the large one can be dropped.

>>> memory = Memory(model)                     # the mode of `model` and of the prompt is "both"
>>> question = memory.see(inputs)              # pictures and videos; what stands behind the last of them is given back
>>> memory.answer(question)                    # ids, told by both sets
>>> memory.detach()
>>> memory.answer(question)                    # those that a prompt of the small set alone has

Text and the small set see neither patches' tokens nor anything that has seen them, so that dropping these changes
nothing that stays; the large set sees everything before it. Only a question sees all that is there. That a question
sees both sets while both are there, and that questions are forgotten again, is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class Memory:
    """Keys and values of one conversation's pictures and videos.

    Args:
        model: a `PointsForConditionalGeneration`, its attention sdpa or eager, which take masks.

    Attributes:
        cache: what is kept. full: (S,) bool, which of its tokens are of a large set. frame: (S,) which picture or step
            each token shows, counted from 0; -1 for text.

    Raises:
        ValueError: an attention that takes no mask.
    """

    def __init__(self, model: Any) -> None:
        kind = model.config.text_config._attn_implementation
        if kind not in ("sdpa", "eager"):
            raise ValueError(f"a memory of both sets needs attention that takes a mask, sdpa or eager; got {kind}")
        self.model, self.cache, self.position = model, DynamicCache(), 0
        self.full = torch.zeros(0, dtype=torch.bool)
        self.frame = torch.zeros(0, dtype=torch.long)

    def __len__(self) -> int:
        """Tokens that are kept."""
        return len(self.full)

    @torch.no_grad()
    def see(self, inputs: Mapping[str, Any]) -> Tensor:
        """Keep a prompt of one row up to the marker behind its last picture or video; (1, Q) ids of the rest.

        It goes on from what was seen before.

        Raises:
            ValueError: several rows, or nothing to see.
        """
        ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
        if len(ids) != 1 or not kinds.any():
            raise ValueError(
                f"a memory takes one row with a picture or a video, got {len(ids)} row(s), "
                f"{'some' if kinds.any() else 'none'} of whose tokens are visual"
            )
        end = int(kinds[0].nonzero()[-1]) + 2  # the last token, and the marker
        grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs}
        seen = {name: value[:, :end] for name, value in inputs.items() if name in ("input_ids", "mm_token_type_ids")}
        paces = inputs.get("second_per_grid_ts")
        positions, _ = self.model.model.get_rope_index(**seen, **grids, second_per_grid_ts=paces)
        full, frame = (part.to(ids.device) for part in self.model.model.sets_of(**seen, **grids))
        past = len(self)
        self.full = torch.cat((self.full.to(ids.device), full))
        first = int(self.frame.max()) + 1 if past else 0
        self.frame = torch.cat((self.frame.to(ids.device), torch.where(frame < 0, frame, frame + first)))
        order = torch.arange(len(self), device=ids.device)
        hidden = (order[None] > order[past:, None]) | (self.full[None] & ~full[:, None])
        dtype = self.model.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=ids.device)
        mask.masked_fill_(hidden, torch.finfo(dtype).min)
        pixels = {name: value for name, value in inputs.items() if name.startswith("pixel_values")}
        self.model.model(
            input_ids=seen["input_ids"],
            attention_mask=mask[None, None],
            position_ids=positions + self.position,
            past_key_values=self.cache,
            use_cache=True,
            **pixels,
            **grids,
        )
        self.position += int(positions.max()) + 1
        rest: Tensor = ids[:, end:]
        return rest

    def detach(self, frames: Collection[int] | None = None) -> None:
        """Drop the large set: of the frames with these numbers, or of all."""
        chosen = self.full if frames is None else self.full & torch.isin(self.frame, torch.tensor(list(frames)).long())
        stays = (~chosen).nonzero().flatten()
        self._keep(stays)
        self.full, self.frame = self.full[stays], self.frame[stays]

    def _keep(self, columns: Tensor) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = (part.index_select(2, columns) for part in (layer.keys, layer.values))

    @torch.no_grad()
    def answer(self, question: Tensor, max_new_tokens: int = 24) -> Tensor:
        """(T,) ids of the most likely answer, token by token, to (1, Q) ids; the memory is as before."""
        end = self.model.generation_config.eos_token_id
        ends = {*end} if isinstance(end, list) else {end}
        length, position, said = len(self), self.position, []
        try:
            for _ in range(max_new_tokens):
                places = position + torch.arange(question.shape[1], device=question.device)
                logits = self.model(
                    input_ids=question,
                    position_ids=places.expand(3, 1, -1),
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits
                position += question.shape[1]
                question = logits[:, -1].argmax(-1, keepdim=True)
                said.append(int(question))
                if said[-1] in ends:
                    break
        finally:
            self._keep(torch.arange(length, device=question.device))
        return torch.tensor(said)
