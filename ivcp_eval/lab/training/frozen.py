"""A model that is not trained: it answers, and says what an answer that it is given costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.interface import AbstractMethod, Signals
from ivcp_eval.interface.models import Weights
from ivcp_eval.interface.variants import Variant
from ivcp_eval.lab.training.gating import Gate, Where, gated
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement

Conversation = list[Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """A question as `Session.answer` takes it, and the answer in the words that the model should give."""

    parts: tuple[Mapping[str, Any], ...]
    answer: str


@dataclass(frozen=True)
class Encoded:
    """One example as the model gets it, the answer behind the prompt.

    Attributes:
        inputs: of the model. labels: (T,) token ids of the answer, its end included. layout: of the pictures.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    layout: Mapping[str, Any]

    @property
    def prompt(self) -> int:
        """How many tokens stand before the answer."""
        return int(self.inputs["input_ids"].shape[1] - self.labels.numel())


class Frozen:
    """A model in memory whose weights stay as they are; gradients go through it.

    Raises:
        MissingWeights, ValueError: as `models.locate` and `Session`.
    """

    def __init__(self, weights: Weights, placement: Placement | None = None, trust_remote_code: bool = False) -> None:
        placement = (placement or Placement(attention="sdpa")).resolve()
        self.session = Session(weights, placement, Limits.published(weights), trust_remote_code)
        self.weights, self.placement, self.model = weights, placement, self.session.model
        self.model.requires_grad_(requires_grad=False)

    def own_answer(self, parts: tuple[Mapping[str, Any], ...]) -> str:
        """What the untouched model answers."""
        return self.session.answer(parts, Variant(self.weights.checkpoint.name)).prediction

    def encoded(self, example: Example) -> Encoded:
        """The example in tokens."""
        adapter, processor = self.session.adapter, self.session.processor
        device = next(self.model.parameters()).device
        conversation: Conversation = [
            {"image": decoded(part["image"])} if "image" in part else part for part in example.parts
        ]
        inputs = dict(adapter.encode(processor, [conversation]))
        tokenizer = getattr(processor, "tokenizer", processor)
        end = self.model.generation_config.eos_token_id
        ids = [*tokenizer.encode(example.answer, add_special_tokens=False), end[0] if isinstance(end, list) else end]
        labels = torch.tensor(ids)
        length = inputs["input_ids"].shape[1]
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.shape == (1, length):
                more = {"input_ids": labels, "attention_mask": torch.ones_like(labels)}
                added = more.get(name, torch.zeros_like(labels)).to(value.dtype)
                inputs[name] = torch.cat((value, added[None]), dim=1)
        moved = {name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()}
        return Encoded(moved, labels.to(device), adapter.layout(processor, [conversation]))

    def logits(
        self,
        encoded: Encoded,
        method: AbstractMethod | None = None,
        ratio: float = 1.0,
        gate: Gate | None = None,
        where: Where = "attention",
    ) -> Tensor:
        """(T, vocabulary) float32 logits of the answer's tokens, each told those before it.

        Args:
            method: at whose cuts, and by whose signals, ``gate`` weighs visual tokens (`gating.gated`); None: none.
        """
        kept = encoded.labels.numel() + 1
        if method is None or gate is None:
            out = self.model(**encoded.inputs, use_cache=False, logits_to_keep=kept)
        else:
            options: dict[str, Any] = {"visible": encoded.prompt, "where": where, "layout": encoded.layout}
            with gated(self.model, method, ratio, gate, **options):
                out = self.model(**encoded.inputs, use_cache=False, logits_to_keep=kept)
        logits: Tensor = out.logits[0, -kept:-1].float()
        return logits

    def answer_loss(self, encoded: Encoded, *pruning: Any, **options: Any) -> Tensor:
        """Mean cross-entropy of the answer's tokens; arguments as for `logits`."""
        return torch.nn.functional.cross_entropy(self.logits(encoded, *pruning, **options), encoded.labels)

    @torch.no_grad()
    def signals(self, encoded: Encoded, method: AbstractMethod, ratio: float) -> Signals:
        """What ``method`` is shown of an example at its first cut; the answer is hidden from it."""
        seen: list[Signals] = []

        def keep(signals: Signals) -> Tensor:
            seen.append(signals)
            return torch.ones(signals.n_visual, device=signals.visual.device)

        self.logits(encoded, method, ratio, keep)
        return seen[0]
