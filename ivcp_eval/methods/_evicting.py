"""What methods that evict from the KV cache share: a budget for every layer, the heaviest tokens of every head."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, ModelFacts, Selection, Signal, Signals
from ivcp_eval.interface.ops import ranking

_HEADS = ("own", "shared")


@dataclass(frozen=True)
class Evictor(AbstractMethod):
    """Keeps, in every layer's cache, the visual tokens that the layer's own attention weighs most.

    Attributes:
        heads: "own": each key head keeps tokens of its own, by the mean of the query heads that read it; "shared": all
            keep the same, by the mean of all heads, which also works where a cache holds no keys (DeepSeek-VL2).
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"query", "key"})

    heads: Literal["own", "shared"] = "own"

    def __post_init__(self) -> None:
        """Refuse a word that no run can mean."""
        if self.heads not in _HEADS:
            raise ValueError(f"heads={self.heads!r} is unknown; use one of {', '.join(_HEADS)}")

    def shares(self, n_layers: int, ratio: float) -> list[float]:
        """Of the visual tokens, what each layer's cache keeps; here the same everywhere."""
        return [ratio] * n_layers

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """An eviction in every layer that does not keep all."""
        by_head: frozenset[Signal] = frozenset({"cached_key"} if self.heads == "own" else ())
        shares = enumerate(self.shares(model.n_layers, ratio))
        return tuple(Cut(layer, share, cache="own", needs=by_head) for layer, share in shares if share < 1)

    @abstractmethod
    def weigh(self, signals: Signals) -> Tensor:
        """(H, V) weights of the visual tokens in each attention head; the heaviest stay."""

    def select(self, signals: Signals) -> Selection:
        """Of each image its budget of heaviest tokens, in every key head."""
        assert signals.key is not None
        groups = 1 if self.heads == "shared" else signals.key.shape[0]
        weight = self.weigh(signals).unflatten(0, (groups, -1)).mean(dim=1)  # (G, V)
        # Cleaned token by token, so that the engine counts broken tokens, not heads.
        weight = torch.nan_to_num(weight.T, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).T
        kept = [image.tokens[ranking(weight[:, image.tokens])[:, : image.budget]] for image in signals.images]
        keep = torch.cat(kept, dim=1).sort(dim=1).values
        return Selection(keep[0] if self.heads == "shared" else keep)
