"""A question with its answer, encoded once, and the loss of the answer under any number of subsets of visual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.engine.fork.trunk import Trunk
from ivcp_eval.engine.geometry import attention_mask, take_position_embeddings, take_sequence
from ivcp_eval.engine.signals.source import images_at_cut, question_tokens
from ivcp_eval.interface.names import read, write

if TYPE_CHECKING:
    from torch import Tensor

    from ivcp_eval.interface import AbstractAdapter, Image, ImageSpan, ModelFacts

#: Tokens that go through the decoder at once; more only costs memory.
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Answered:
    """One question and its answer, where they enter the first decoder layer that may be cut.

    Attributes:
        hidden: (1, S, E). kwargs: what the layer gets beside them. layer: its number.
        visual, text: (N,) and (T,) int64 columns, on the CPU; the last A of all columns are the answer's.
        question: (Q,) int64, the text between the last picture and the answer, likewise.
        spans: of the pictures. answer: (A,) int64 token ids.
        renumber: whether survivors are numbered anew (`ModelFacts.renumbers`).
    """

    model: Any
    wired: AbstractAdapter
    hidden: Tensor
    kwargs: Mapping[str, Any]
    layer: int
    visual: Tensor
    text: Tensor
    question: Tensor
    spans: tuple[ImageSpan, ...]
    answer: Tensor
    renumber: bool

    @classmethod
    def of(
        cls,
        model: Any,
        wired: AbstractAdapter,
        facts: ModelFacts,
        inputs: Mapping[str, Any],
        answer: Tensor,
        layout: Mapping[str, Any],
    ) -> Answered:
        """Run the vision tower, and the decoder up to the first layer that may be cut, once.

        Args:
            inputs: of the model, one row that ends with the answer. answer: (A,) int64, its token ids.
            layout: options of `ivcp_eval.prune` for the prompt.

        Raises:
            ValueError: the prompt has no picture.
        """
        trunk = Trunk(model, wired, facts.family, {facts.first_cut: frozenset()}, False, layout, [])
        with torch.no_grad():
            trunk.prefill(inputs)
        if trunk.prompt is None:
            raise ValueError("the prompt has no visual tokens, so there is nothing to choose")
        entering = trunk.snapshots[facts.first_cut]
        mask = trunk.prompt.image_mask[0]
        visual, text = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        behind = question_tokens(torch.arange(mask.numel()), visual, text, wired.closing_tokens)
        return cls(
            model,
            wired,
            entering.hidden,
            entering.kwargs,
            facts.first_cut,
            visual,
            text,
            behind[: -answer.numel()],
            tuple(trunk.prompt.spans[0]),
            answer,
            facts.renumbers(None),
        )

    @property
    def embeddings(self) -> Tensor:
        """(N, E) the visual tokens, as a method that cuts here sees them."""
        return self.hidden[0, self.visual]

    def images(self, ratio: float) -> tuple[Image, ...]:
        """The pictures with their budgets at a retention ratio, as a method that cuts here sees them."""
        return images_at_cut(list(self.spans), self.visual, ratio)

    def losses(self, subsets: Tensor) -> Tensor:
        """(n,) float32: mean negative log-likelihood of the answer's tokens, in nats, when only a subset is kept.

        Args:
            subsets: (n, K) int64 indices into the visual tokens, on the CPU; the order does not matter.
        """
        size = max(1, TOKENS_AT_ONCE // (self.text.numel() + subsets.shape[1]))
        with torch.no_grad():
            return torch.cat([self._losses(part) for part in subsets.split(size)])

    def whole_loss(self) -> float:
        """The loss when nothing is dropped."""
        return float(self.losses(torch.arange(self.visual.numel())[None]))

    def _losses(self, subsets: Tensor) -> Tensor:
        decoder = self.wired.text_model(self.model)
        text = self.text.expand(len(subsets), -1)
        columns = torch.cat((text, self.visual[subsets]), dim=1).sort(dim=1).values
        hidden = take_sequence(self.hidden, columns)
        places = torch.arange(columns.shape[1]).expand_as(columns) if self.renumber else columns
        embeddings = take_position_embeddings(read(self.kwargs, "position_embeddings"), places)
        implementation, mask = decoder.config._attn_implementation, None
        if implementation == "eager":  # the others are causal by themselves
            mask = attention_mask(
                columns.to(hidden.device), columns.shape[1], implementation=implementation, dtype=hidden.dtype
            )
        given: dict[str, Any] = {"attention_mask": mask, "position_embeddings": embeddings, "position_ids": None}
        kwargs = write(self.kwargs, **given, cache=None)
        for layer in decoder.layers[self.layer :]:
            hidden = layer(hidden, **kwargs)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        predicting = decoder.norm(hidden[:, -len(self.answer) - 1 : -1])
        logits = self.model.get_output_embeddings()(predicting).float()
        right = self.answer.expand(len(subsets), -1)
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), right, reduction="none").mean(dim=1)
