"""Builds what a method sees (`ivcp_eval.interface.Signals`) from what the hooks captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch

from ivcp_eval.engine.geometry import is_member, row_position_embeddings
from ivcp_eval.interface import BudgetOf, Cut, Image, ImageSpan, Signals
from ivcp_eval.interface.ops import budgets, to_device

if TYPE_CHECKING:
    from torch import Tensor

    from ivcp_eval.interface import AbstractAdapter


def images_at_cut(
    spans: list[ImageSpan], visual_columns: Tensor, ratio: float, budget_of: BudgetOf = "image"
) -> tuple[Image, ...]:
    """The images of a row with their alive tokens and budgets.

    The budget of an image is `ops.budget` of its *prompt* tokens, so staged ratios do not compound, and at most
    what is alive. That of a clip is the same of all its frames, split among them by their prompt tokens.
    """
    alive = [_alive(span, visual_columns) for span in spans]
    groups = range(len(spans)) if budget_of == "image" else [_clip(span, place) for place, span in enumerate(spans)]
    allowances = budgets(ratio, [span.columns.numel() for span in spans], [len(tokens) for tokens in alive], groups)
    images = []
    for span, tokens, allowed in zip(spans, alive, allowances, strict=True):
        view = None
        if span.views:
            first = torch.tensor(span.views).cumsum(0)  # first token behind each view
            places = torch.searchsorted(span.columns, visual_columns[tokens])
            view = torch.searchsorted(first, places, right=True)
        images.append(Image(tokens=tokens, budget=allowed, n_prompt=span.columns.numel(), span=span, view=view))
    return tuple(images)


def _alive(span: ImageSpan, visual_columns: Tensor) -> Tensor:
    """(N,) which of the row's visual tokens are the span's; looks at its stretch only, as there may be 1,000 spans."""
    low, high = torch.searchsorted(visual_columns, span.columns[[0, -1]] + torch.tensor([0, 1])).tolist()
    return is_member(visual_columns[low:high], span.columns).nonzero().flatten() + low


def _clip(span: ImageSpan, place: int) -> tuple[str, int]:
    """What tells the clip of a span from others; a picture, at ``place`` in the row, is a clip of its own."""
    return ("picture", place) if span.frame is None else ("clip", span.frame.clip)


def _image_to(image: Image, device: torch.device) -> Image:
    view = None if image.view is None else to_device(image.view, device)
    return replace(image, tokens=to_device(image.tokens, device), view=view)


def question_tokens(columns: Tensor, visual: Tensor, text: Tensor, closing_tokens: int) -> Tensor:
    """Text tokens after the last image and its closing marker; all text tokens where there are none.

    Args:
        columns: (n,) prompt columns of the row's alive tokens.
        visual: (V,) indices of its visual tokens. text: (T,) of its text tokens.
        closing_tokens: marker tokens that close an image.
    """
    after = text[columns[text] > columns[visual[-1]] + closing_tokens]
    return after if after.numel() else text


def rotary_spectrum(inv_freq: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 (cos, sin), each (A, n, R), of position ids (A, n), over the full spectrum of every axis."""
    angles = position_ids.float()[..., None] * inv_freq.float()
    # Both halves of the rotary dimensions turn by the same angles: half the trigonometry.
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)


def attention_rows(query: Tensor, key: Tensor, rows: Tensor | range, scaling: float) -> Tensor:
    """Causal softmax attention of the query rows only: (H, n, D), (G, n, D), (r,) -> float32 (H, r, n).

    Memory is linear in n for a fixed number of rows, so no attention map is ever asked of the model. Of a range of rows
    the keys behind its end, which none of them sees, are left out: (H, r, end).
    """
    if isinstance(rows, range):
        query, key = query[:, rows.start : rows.stop], key[:, : rows.stop]
    else:
        query = query[:, rows]
    groups = query.shape[0] // key.shape[0]
    queries = query.float().unflatten(0, (key.shape[0], groups))  # (G, H/G, r, D)
    logits = torch.einsum("ghrd,gnd->ghrn", queries, key.float()).flatten(0, 1) * scaling
    if isinstance(rows, range):
        future = torch.ones(len(rows), len(rows), dtype=torch.bool, device=key.device).triu_(1)
        logits[:, :, rows.start :].masked_fill_(future, -torch.inf)
        return logits.softmax(dim=-1)
    future = torch.arange(key.shape[1], device=key.device)[None, :] > rows[:, None]
    return logits.masked_fill(future, -torch.inf).softmax(dim=-1)


def _at(states: Tensor, slots: Tensor) -> Tensor:
    """The sequence positions ``slots`` of (..., n, F); the tensor itself where that is all of them."""
    return states if slots.numel() == states.shape[-2] else states.index_select(-2, slots.to(states.device))


@dataclass(frozen=True)
class SignalSource:
    """Row views on one prefill's captured tensors, at one cut.

    Attributes:
        adapter, family, text_model: of the model. cut, stage: the cut, and how many came before it.
        hidden: (B, n, E) states that enter its layer. captured: projections of the layer before.
        position_ids, position_embeddings: what the rotary embedding got and what the layer gets.
    """

    adapter: AbstractAdapter
    family: str
    text_model: Any
    cut: Cut
    stage: int
    hidden: Tensor
    captured: Mapping[str, Tensor]
    position_ids: Tensor
    position_embeddings: Any

    def row(
        self,
        index: int,
        columns: Tensor,
        slots: Tensor,
        is_visual: Tensor,
        spans: list[ImageSpan],
        vision: dict[str, Tensor],
        memory: dict[str, Any],
        seed: int,
        ids: Tensor | None,
    ) -> Signals:
        """The signals of batch row ``index``, whose alive prompt ``columns`` (n,) stand at ``slots`` (n,)."""
        device = self.hidden.device
        slots = to_device(slots, device)
        visual, text = is_visual.nonzero().flatten(), (~is_visual).nonzero().flatten()
        images = images_at_cut(spans, columns[visual], self.cut.ratio, self.cut.budget)
        question = question_tokens(columns, visual, text, self.adapter.closing_tokens)
        # Those of the layer before may be on another device.
        states = {name: _at(tensor[index], slots).to(device) for name, tensor in self.captured.items()}

        def rope() -> tuple[Tensor, Tensor]:
            ids = self.position_ids if self.position_ids.ndim == 3 else self.position_ids[None]
            # (1, S) ids are shared by all rows (language models alone build them without a batch).
            ids = ids[:, min(index, ids.shape[1] - 1), to_device(columns, ids.device)]
            return rotary_spectrum(self.text_model.rotary_emb.inv_freq.to(device), ids.to(device))

        rotated = self._rotator(index, slots)
        return Signals(
            images=tuple(_image_to(image, device) for image in images),
            visual=to_device(visual, device),
            text=to_device(text, device),
            question=to_device(question, device),
            hidden=_at(self.hidden[index], slots),
            rope=rope,
            attention=self._attention(index, slots, states, rotated),
            rotate=rotated,
            project=lambda signal: self._entering(index, slots, signal),
            normed=lambda: self.text_model.norm(_at(self.hidden[index], slots)),
            value=states.get("value"),
            key=states.get("key"),
            query=states.get("query"),
            raw_value=states.get("raw_value"),
            vision=vision,
            columns=columns[visual],
            cut=self.cut,
            ids=ids,
            stage=self.stage,
            family=self.family,
            generator=torch.Generator().manual_seed(seed),
            memory=memory,
        )

    def _rotator(self, index: int, slots: Tensor) -> Callable[[Tensor], Tensor]:
        def rotated(tensor: Tensor) -> Tensor:
            own = row_position_embeddings(self.position_embeddings, index, self.text_model.config, tensor.device)
            single = isinstance(own, torch.Tensor)
            return self.adapter.rotate(tensor, _at(own, slots) if single else tuple(_at(part, slots) for part in own))

        return rotated

    def _attention(
        self, index: int, slots: Tensor, states: dict[str, Tensor], rotated: Callable[[Tensor], Tensor]
    ) -> Callable[..., Tensor]:
        @cache
        def turned(entering: bool) -> tuple[Tensor, Tensor]:
            if entering:
                query, key = self._entering(index, slots, "query"), self._entering(index, slots, "key")
            else:
                if not {"query", "key"} <= states.keys():
                    raise ValueError(
                        f"attention of the layer before the cut at layer {self.cut.layer} was asked for, but its "
                        'queries and keys were not captured: name both in `needs` ("query", "key"), cut at layer 1 or '
                        "later, or ask for that of the layer that is entered (entering=True)"
                    )
                query, key = states["query"], states["key"]
            return rotated(query), rotated(key)

        def attention(rows: Tensor | range, entering: bool = False) -> Tensor:
            own = entering or self.cut.evicts
            layer = self.text_model.layers[self.cut.layer if own else self.cut.layer - 1]
            return attention_rows(*turned(entering), rows, layer.self_attn.scaling)

        return attention

    def _entering(self, index: int, slots: Tensor, signal: Literal["query", "key"]) -> Tensor:
        """(heads, n, D) what the layer of the cut projects from the states that enter it."""
        if self.cut.evicts:
            raise ValueError(
                f"what layer {self.cut.layer} projects of the states that enter it was asked for at an eviction, after "
                f"it ran; name {signal!r} in `needs` and read signals.{signal}"
            )
        layer = self.text_model.layers[self.cut.layer]
        module, heads = self.adapter.projection(layer, signal)
        return heads(module(layer.input_layernorm(_at(self.hidden[index], slots)[None])))[0]
