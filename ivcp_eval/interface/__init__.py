"""The seam: everything a pruning method sees (`Signals`), returns (`Selection`), and what a model family provides.

Shape legend used in every file:
    B batch rows, S prompt columns (padding included), n tokens of one row alive at a cut, V visual tokens of one row
    alive at a cut, K kept, T text tokens, H query heads, G key/value heads, D head size, E hidden size,
    A rotary axes (3 for M-RoPE, else 1), R rotary dimensions.

A method handles one row (one sample) at a time and thinks in visual tokens 0..V-1. It never sees padding, the
cache, position ids to be edited, or the batch: `ivcp_eval.engine` applies what it chose. See docs/design/engine.md.
"""

from __future__ import annotations

from ivcp_eval.interface.family import GREEDY, AbstractAdapter, Checkpoint, PatchStates, QuestionKind, VisionTap
from ivcp_eval.interface.method import (
    WHOLE,
    AbstractMethod,
    AbstractScorer,
    BudgetOf,
    CachedKeys,
    CachePolicy,
    Cut,
    Faithfulness,
    Frame,
    Geometry,
    Image,
    ImageSpan,
    ModelFacts,
    Patches,
    Processed,
    Rectangle,
    Selection,
    Signal,
    Signals,
    Step,
    TowerFacts,
    TowerSignal,
    Unsupported,
    View,
    check_type,
    grid_view,
)

__all__ = [
    "GREEDY",
    "WHOLE",
    "AbstractAdapter",
    "AbstractMethod",
    "AbstractScorer",
    "BudgetOf",
    "CachePolicy",
    "CachedKeys",
    "Checkpoint",
    "Cut",
    "Faithfulness",
    "Frame",
    "Geometry",
    "Image",
    "ImageSpan",
    "ModelFacts",
    "PatchStates",
    "Patches",
    "Processed",
    "QuestionKind",
    "Rectangle",
    "Selection",
    "Signal",
    "Signals",
    "Step",
    "TowerFacts",
    "TowerSignal",
    "Unsupported",
    "View",
    "VisionTap",
    "check_type",
    "grid_view",
]
