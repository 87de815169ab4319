"""What a report shows, as plain data: `collect` gathers it, `charts` and `page.html` show it.

Missing numbers are NaN, as in `ComparedRow`. Rectangles are (x0, y0, x1, y1) in fractions of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ivcp_eval.interface.method import Rectangle
from ivcp_eval.reports.comparison import ComparedRow, Comparison
from ivcp_eval.reports.stats.timing import TimeRatio
from ivcp_eval.reports.views.costs import Costs
from ivcp_eval.reports.views.decision import Decision

__all__ = [
    "AXES",
    "COSTS",
    "Ability",
    "Cost",
    "Cut",
    "Flip",
    "FlipCount",
    "Mark",
    "Panel",
    "Pareto",
    "Picture",
    "Position",
    "Provenance",
    "Report",
    "Shown",
    "Spread",
    "Stage",
    "costs_of",
]

#: Measured costs that a score is plotted against, all shares of the unpruned model's -> how an axis calls them.
COSTS = {
    "layers": "visual tokens, mean over layers",
    "flops": "FLOPs of the prefill",
    "kv": "visual tokens' bytes in the KV cache",
    "prefill": "time of the prefill",
    "end_to_end": "time end to end",
}
#: Along which the places of kept cells are counted -> in words.
AXES = {"rows": "top to bottom", "columns": "left to right", "centre": "centre to edge"}
FlipKind = Literal["lost", "gained", "changed"]


def costs_of(row: ComparedRow) -> dict[str, float]:
    """What one row measured of each of `COSTS`."""
    shares = {"layers": row.ratio_layer_mean, "flops": row.ratio_flops, "kv": row.ratio_kv_cache}
    return shares | {stage: row.times[stage].ratio for stage in ("prefill", "end_to_end")}


@dataclass(frozen=True)
class Mark:
    """One variant in a plot.

    Attributes:
        method: with its settings, by which it is coloured. random: the control that others must beat.
        score, low, high: with its 95 % interval: on a panel the score of the benchmark, else the mean retained percent.
        costs: see `COSTS`. better: than random at the same ratio or budget; None where that was not measured.
    """

    variant: str
    method: str
    random: bool
    score: float
    low: float
    high: float
    costs: Mapping[str, float]
    better: bool | None


@dataclass(frozen=True)
class Panel:
    """One benchmark of one model: score against cost.

    Attributes:
        baseline, floor: score of the unpruned model, and the largest difference of its second answers to its
            first, NaN: not measured. others: likewise of the other ways, where rows were computed in several.
    """

    model: str
    benchmark: str
    metric: str
    baseline: float
    floor: float
    marks: tuple[Mark, ...]
    others: tuple[tuple[float, float], ...] = ()

    @property
    def unmoved(self) -> bool:
        """Whether second answers were measured and no benchmark changed its score."""
        floors = [self.floor, *(floor for _, floor in self.others)]
        return 0 in floors and not any(floor > 0 for floor in floors)


@dataclass(frozen=True)
class Pareto:
    """One model: mean retained percent over its benchmarks against cost.

    Attributes:
        left_out: variants that lack a benchmark, whose mean would be one of other things.
    """

    model: str
    benchmarks: tuple[str, ...]
    floor: float
    marks: tuple[Mark, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class FlipCount:
    """How many answers of a variant flipped, cards or not.

    Attributes:
        changed: answers that are another text with the same score, which is not the full one. again: answers of the
            unpruned model whose text changed when it answered again; None where that is not known.
    """

    model: str
    benchmark: str
    variant: str
    lost: int
    gained: int
    changed: int
    again: int | None


@dataclass(frozen=True)
class Flip:
    """One answer that flipped.

    Attributes:
        gold: true answer; empty where agreement is measured. before, after: stretches of the unpruned model's and of
            the variant's answer, each with whether the other has it too. cut: an answer is longer than what is shown.
        picture: `Picture.name` of the sample; empty if it is not shown.
    """

    kind: FlipKind
    model: str
    benchmark: str
    variant: str
    index: str
    category: str
    question: str
    gold: str
    before: tuple[tuple[str, bool], ...]
    after: tuple[tuple[str, bool], ...]
    iou_before: float
    iou_after: float
    cut: bool = False
    picture: str = ""


@dataclass(frozen=True)
class Cut:
    """What one cut left of a picture's cells.

    Attributes:
        layer: decoder layer before which it was made. kept: tokens of the picture that are alive after it.
        dropped, merged: numbers of cells, row by row; merged ones are among the dropped.
        by_frame: tokens alive in each frame (grid step) of a video that is drawn; none of a picture.
    """

    layer: int
    kept: int
    dropped: tuple[int, ...]
    merged: tuple[int, ...]
    by_frame: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shown:
    """What one variant made of a picture.

    Attributes:
        tokens: of the picture, or of a video whose steps stand side by side in it. grid: (rows, columns) of the cells;
            None where it is not known how tokens lie.
        covers: part of the picture that the grid spans.
    """

    variant: str
    answer: str
    score: float
    box: Rectangle | None = None
    iou: float = math.nan
    tokens: int = 0
    grid: tuple[int, int] | None = None
    covers: Rectangle = (0.0, 0.0, 1.0, 1.0)
    cuts: tuple[Cut, ...] = ()


@dataclass(frozen=True)
class Picture:
    """One sample, its picture once.

    Attributes:
        name: unique in the report. jpeg: at most 30 kB; empty where the benchmark's file is not here.
        missing: why there is no picture. size: (width, height) of the picture as it was asked about.
        shown: the unpruned model, then variants. frames: grid steps of a video; 0 of a picture. drawn: those of them
            that stand side by side in the picture.
    """

    name: str
    model: str
    benchmark: str
    index: str
    question: str
    gold: str
    box: Rectangle | None
    jpeg: bytes
    missing: str
    size: tuple[int, int]
    shown: tuple[Shown, ...]
    frames: int = 0
    drawn: int = 0


@dataclass(frozen=True)
class Position:
    """Which share of the cells in one part of the pictures a variant kept at its last cut.

    Attributes:
        axis: one of `AXES`. place: 0..1 along it.
        samples: that were read.
    """

    model: str
    variant: str
    axis: str
    place: float
    share: float
    samples: int


@dataclass(frozen=True)
class Ability:
    """Mean score per sample, in percent, of one category of a benchmark.

    Attributes:
        floor: largest distance of the unpruned model's second answers from 100 retained percent; NaN: not measured.
    """

    model: str
    benchmark: str
    category: str
    variant: str
    n: int
    baseline: float
    pruned: float
    retained: float
    low: float
    high: float
    floor: float = math.nan


@dataclass(frozen=True)
class Spread:
    """Milliseconds: median and quartiles over timed samples."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Stage:
    """Times of one stage.

    Attributes:
        before, after: of the unpruned model and the variant, same samples. ratio: paired. bound: the share of time that
            would be left if time went with what is counted; NaN where nothing bounds it.
    """

    before: Spread
    after: Spread
    ratio: TimeRatio
    bound: float


@dataclass(frozen=True)
class Cost:
    """What a variant costs, over all its benchmarks.

    Attributes:
        stages: name (`stats.timing.STAGES`) -> times; none where nothing was timed.
        kv_bytes, kv_bytes_unpruned: of the visual tokens of a mean prompt. words: what to make of it.
    """

    model: str
    variant: str
    device: str
    layers: float
    flops: float
    kv: float
    kv_bytes: float
    kv_bytes_unpruned: float
    stages: Mapping[str, Stage]
    words: str


@dataclass(frozen=True)
class Provenance:
    """How the results were made.

    Attributes:
        warnings: what to know before a number is believed. facts: column -> its values in the file.
        files: path -> SHA-256. command: that made the report.
    """

    warnings: tuple[str, ...]
    facts: Mapping[str, tuple[str, ...]]
    files: Mapping[str, str]
    command: str


@dataclass(frozen=True)
class Report:
    """Everything, in the order in which it is shown.

    Attributes:
        decision: None where no rule was stated. again: the unpruned model answered a second time, against its first.
        benched: costs that a bench measured; None where none was joined.
        flip_counts: of all answers; flips, pictures: those that have a card. unread: what could not be shown, and why.
    """

    title: str
    comparison: Comparison
    decision: Decision | None
    again: tuple[ComparedRow, ...]
    paretos: tuple[Pareto, ...]
    panels: tuple[Panel, ...]
    flip_counts: tuple[FlipCount, ...]
    flips: tuple[Flip, ...]
    pictures: tuple[Picture, ...]
    positions: tuple[Position, ...]
    abilities: tuple[Ability, ...]
    costs: tuple[Cost, ...]
    benched: Costs | None
    provenance: Provenance
    unread: tuple[str, ...] = field(default=())

    @property
    def cards(self) -> int:
        """Samples that are shown one by one."""
        return len(self.flips) + len(self.pictures)

    def cards_of(self, count: FlipCount) -> int:
        """How many of the flips counted there have a card."""
        place = count.model, count.benchmark, count.variant
        return sum((flip.model, flip.benchmark, flip.variant) == place for flip in self.flips)

    @property
    def methods(self) -> Sequence[str]:
        """Methods in plots, in the order of the results; random is drawn in grey."""
        marks = [mark for panel in self.panels for mark in panel.marks]
        return list(dict.fromkeys(mark.method for mark in marks if not mark.random))
