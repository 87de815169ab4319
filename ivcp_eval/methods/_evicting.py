"""What methods that evict from the KV cache share: a budget for every layer, the heaviest tokens of every head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, Cut, Image, ModelFacts, Selection, Signal, Signals

_POOLS: dict[str, Callable[..., Tensor]] = {
    "mean": torch.nn.functional.avg_pool1d,
    "max": torch.nn.functional.max_pool1d,
}


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
        if self.heads not in ("own", "shared"):
            raise ValueError(f"heads={self.heads!r} is unknown; use one of own, shared")

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

    def spread(self, weight: Tensor) -> Tensor:
        """(H, N) weights of one image's tokens after they were shared with neighbours; here with none."""
        return weight

    def groups(self, signals: Signals) -> int:
        """How many choices a layer makes: one for each key head, or one for all."""
        assert signals.key is not None
        return 1 if self.heads == "shared" else signals.key.shape[0]

    def select(self, signals: Signals) -> Selection:
        """Of each image its budget of heaviest tokens, in every key head."""
        return Selection(
            self.best(self.ranked(self.weigh(signals), self.groups(signals), signals.images), signals.images)
        )

    def ranked(self, weight: Tensor, groups: int, images: Sequence[Image]) -> list[Tensor]:
        """Of each image (G, N): its tokens by falling ``weight`` (H, V) in each of the ``groups`` of heads."""
        own = [self.spread(weight[:, image.tokens]).unflatten(0, (groups, -1)).mean(dim=1) for image in images]
        return [image.tokens[_heaviest(part)] for part, image in zip(own, images, strict=True)]

    def best(self, ranked: Sequence[Tensor], images: Sequence[Image]) -> Tensor:
        """(K,), or (G, K), increasing: as many of each image's ``ranked`` tokens (G, N) as its budget allows."""
        kept = [tokens[:, : image.budget] for tokens, image in zip(ranked, images, strict=True)]
        keep = torch.cat(kept, dim=1).sort(dim=1).values
        return keep[0] if self.heads == "shared" else keep


def _heaviest(weight: Tensor) -> Tensor:
    """(G, N) tokens by falling weight in each head: `ops.ranking`, in fewer operations, for there are many layers."""
    # Cleaned token by token, so that the engine counts broken tokens, not heads.
    clean = torch.nan_to_num(weight.T, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).T
    return torch.sort(clean, dim=1, descending=True, stable=True).indices


@dataclass(frozen=True)
class Voting(Evictor):
    """Weighs by the attention of the question's last tokens, which neighbours in the image share.

    Attributes:
        window: tokens that vote.
        kernel, pooling: each token gets the "mean" or the "max" of the votes for it and its neighbours, an odd number
            of tokens in all; 1 for its own alone.
    """

    window: int = 32
    kernel: int = 5
    pooling: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        """Refuse sizes that no run can mean."""
        super().__post_init__()
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window={self.window} must be 1 or more, kernel={self.kernel} an odd number of 1 or more")
        if self.pooling not in _POOLS:
            raise ValueError(f"pooling={self.pooling!r} is unknown; use one of {', '.join(_POOLS)}")

    def weigh(self, signals: Signals) -> Tensor:
        """The votes of the window."""
        return signals.attention(signals.question[-self.window :])[:, :, signals.visual].sum(dim=1)

    def spread(self, weight: Tensor) -> Tensor:
        """Pooled."""
        return _POOLS[self.pooling](weight, self.kernel, stride=1, padding=self.kernel // 2)
