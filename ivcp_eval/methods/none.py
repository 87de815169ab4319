"""Keeps every visual token: the unpruned model through the same code path.

Differs: nothing to differ from; the control that every comparison is made against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ivcp_eval.interface import AbstractMethod, Cut, Faithfulness, ModelFacts, Selection, Signals


@dataclass(frozen=True)
class Method(AbstractMethod):
    """No cut at all, whatever the ratio."""

    faithfulness: ClassVar[Faithfulness] = "control"

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """None."""
        return ()

    def select(self, signals: Signals) -> Selection:
        """Everything (never called by the engine, which cuts nowhere)."""
        return Selection(torch.arange(signals.n_visual, device=signals.visual.device), exact=False)
