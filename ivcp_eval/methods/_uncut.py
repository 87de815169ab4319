"""What methods have in common that remove no token in the prefill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ivcp_eval.interface import AbstractMethod, Cut, ModelFacts, Selection, Signal, Signals


@dataclass(frozen=True)
class Uncut(AbstractMethod):
    """A method that cuts nowhere: what it saves, it saves elsewhere."""

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """None."""
        return ()

    def select(self, signals: Signals) -> Selection:
        """Everything (never called by the engine, which cuts nowhere)."""
        return Selection(torch.arange(signals.n_visual, device=signals.visual.device), exact=False)


@dataclass(frozen=True)
class ChannelPruner(Uncut):
    """A method whose retention ratio is the share of the channels of cached visual keys that are kept."""

    needs: ClassVar[frozenset[Signal]] = frozenset({"cached_key"})
    query_window: ClassVar[int] = 32

    def key_share(self, ratio: float) -> float:
        """The retention ratio itself; what is kept once per head and layer is left out."""
        return ratio


def channels_kept(size: int, ratio: float) -> int:
    """How many of ``size`` channels stay, as the released code of RotateK and ThinK rounds."""
    return max(1, size - int(size * (1 - ratio) + 1e-9))
