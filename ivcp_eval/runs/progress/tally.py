"""What a `Watch` counts: of a benchmark, and of each cell of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

State = Literal["waiting", "running", "answered", "scored", "failed", "skipped"]
"""Nobody is at it | a live worker is | all is answered, not scored | whole | scored, but not whole | cannot run."""


@dataclass
class Tally:
    """One benchmark of one model, or the sum of all.

    Attributes:
        samples, answered, failed: of the benchmark, and again for each other way in which its model is loaded
            (`ModelPlan.placement_of`) and each variant that a server answers; a failed sample counts as answered once
            its unit is done.
        cells, scored, broken: variants; ``broken`` are scored ones that are not whole.
        working: units that a live worker holds.
        visual_tokens, visual_kept: of the pruned answers seen so far, so that big pictures weigh as they cost.
        units, units_done: ranges of samples that one worker takes at a time.
        agree, compared: answers made together in half precision, of which one of every unit is made alone too.
        seconds, timed: that the finished units took, and the samples that were answered in them.
        reasons, skipped: why cells are not whole, and why their model cannot run others.
    """

    model: str = ""
    benchmark: str = ""
    samples: int = 0
    answered: int = 0
    failed: int = 0
    cells: int = 0
    scored: int = 0
    broken: int = 0
    working: int = 0
    visual_tokens: int = 0
    visual_kept: int = 0
    units: int = 0
    units_done: int = 0
    agree: int = 0
    compared: int = 0
    seconds: float = 0.0
    timed: int = 0
    reasons: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Samples that are not answered yet."""
        return self.samples - self.answered

    @property
    def kept(self) -> float | None:
        """Share of the visual tokens alive after the last cut, in pruned answers; None before the first."""
        return self.visual_kept / self.visual_tokens if self.visual_tokens else None

    @property
    def complete(self) -> bool:
        """Nothing is left to answer or score."""
        return self.answered == self.samples and self.scored == self.cells


@dataclass(frozen=True)
class CellState:
    """How far one variant on one benchmark is.

    Attributes:
        variant: its name, without the model's. answered: of its ``samples``.
        reason: why it failed or cannot run; of a cell that is not scored yet, the last error of a sample, or empty.
    """

    model: str
    benchmark: str
    variant: str
    state: State
    answered: int
    samples: int
    reason: str = ""
