"""A finished comparison: its rows and its CSV; `terminal.py` and `footer` make its table."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ivcp_eval.files import as_shown, atomic_write
from ivcp_eval.reports.provenance import label
from ivcp_eval.reports.stats.margins import LossTest, loss_test
from ivcp_eval.reports.stats.timing import STAGES, TimeRatio
from ivcp_eval.reports.table import Row

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ComparedRow", "Comparison", "NoiseFloor"]


@dataclass(frozen=True)
class NoiseFloor:
    """The unpruned model answered a second time against itself: differences up to these are no effect of pruning.

    Attributes:
        settings: what differed beside batching and order, e.g. ``attention=eager``. difference: in the unit of the
            score. answers_changed: answers whose text changed; None where they are not known.
    """

    settings: str = ""
    difference: float = math.nan
    answers_changed: int | None = None


@dataclass(frozen=True)
class ComparedRow:
    """One (model, benchmark, metric, variant) against its baseline. Missing: NaN, None or an empty text.

    Differences are pruned - baseline in the unit of the score; ``*_percent`` are percent; ``ratio_*`` shares of the
    visual tokens (``ratio_asked`` of ``budget``, where one was held; ``ratio_flops`` of the prefill's FLOPs). Where a
    method draws, the row is of all its seeds (``seed`` is None): ``score_pruned`` and the shares are means over them.

    Attributes:
        method_parameters: canonical JSON of all of them. settings: those that tell the variant from others of its
            method in the file, e.g. ``layer=3``.
        dtype, attention, device, video: of the row, where and how it was computed.
        limit: only the first so many rows of the benchmark were asked; None: all.
        score_lowest_seed, score_highest_seed: spread over the ``n_seeds`` seeds.
        times: stage -> pruned / baseline, paired by sample (`stats.timing`).
        paired: interval and test are over samples; else from totals.
        p_holm, p_benjamini_hochberg: over all rows of the comparison but those of the baseline itself.
        baseline_ratio_layer_mean: of the rows that it is compared with.
        rank: among the variants and one reference for all (``--against METHOD:RATIO``), 1 is best; rank_low and
            rank_high: ranks that the intervals allow.
        again: what the unpruned model's second answers say, where a sweep asked for them (``controls: [again]``).
    """

    model: str
    benchmark: str
    metric: str
    method: str
    method_parameters: str | None
    preset: str
    seed: int | None
    baseline_method: str
    baseline_source: str
    source: str
    ratio_asked: float
    ratio_kept_final: float
    ratio_layer_mean: float
    ratio_kv_cache: float
    score_scale: float
    score_baseline: float
    score_pruned: float
    difference: float
    retained_percent: float
    trained_weights: bool
    settings: str = ""
    dtype: str = ""
    attention: str = ""
    device: str = ""
    video: str = ""
    limit: int | None = None
    n_seeds: int = 1
    score_lowest_seed: float = math.nan
    score_highest_seed: float = math.nan
    times: Mapping[str, TimeRatio] = field(default_factory=lambda: {stage: TimeRatio() for stage in STAGES})
    budget: str = ""
    ratio_method: float = math.nan
    ratio_flops: float = math.nan
    notes: tuple[str, ...] = ()
    paired: bool = False
    difference_low: float = math.nan
    difference_high: float = math.nan
    retained_percent_low: float = math.nan
    retained_percent_high: float = math.nan
    right_to_wrong: float | None = None
    wrong_to_right: float | None = None
    answers_changed: int | None = None
    graded: bool = False
    n_samples: int | None = None
    n_clusters: int | None = None
    standard_error: float = math.nan
    test: str = ""
    p_value: float = math.nan
    p_holm: float = math.nan
    p_benjamini_hochberg: float = math.nan
    minimal_detectable_effect: float = math.nan
    baseline_ratio_layer_mean: float = math.nan
    rank: int | None = None
    rank_low: int | None = None
    rank_high: int | None = None
    again: tuple[NoiseFloor, ...] = ()
    verdict: str = ""

    @property
    def variant(self) -> str:
        """Method with what tells it from other variants, preset, and ratio or budget, as people say it."""
        method = f"{self.method}({self.settings})" if self.settings else self.method
        ratio = "" if self.method == "none" or math.isnan(self.ratio_asked) else f"{self.ratio_asked:g}"
        ratio += f" of {self.budget}" if ratio and self.budget else ""
        return " ".join(part for part in (method, self.preset, ratio) if part)

    @property
    def noise_floor(self) -> NoiseFloor:
        """The largest of `again`, by its difference, then by the answers that changed; an empty one without any."""
        return max(self.again, key=lambda a: (abs(a.difference), a.answers_changed or 0), default=NoiseFloor())

    def margin(self, percent: float) -> float:
        """``percent`` of the score's scale, in the unit of the score."""
        return percent * self.score_scale / 100

    def loss_test(self, percent: float) -> LossTest | None:
        """Of a loss of ``percent`` of the score's scale; None where nothing can be tested."""
        n_clusters, margin = self.n_clusters or self.n_samples or 0, self.margin(percent)
        return loss_test(self.difference, self.standard_error, n_clusters, margin, self.score_scale)

    @property
    def where(self) -> str:
        """What the row is about, for notes."""
        return f"{self.model} {self.benchmark} {self.metric} {self.variant}"

    def record(self) -> dict[str, Any]:
        """Flat: column of the comparison's CSV -> value."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("times", "again")}
        values |= {f"again_{name}": value for name, value in vars(self.noise_floor).items()}
        for stage, time in self.times.items():
            values |= {f"{stage}_time_{end}": getattr(time, end) for end in ("ratio", "low", "high")}
        return values | {"timed_samples": max(time.n for time in self.times.values()), "notes": "; ".join(self.notes)}


@dataclass(frozen=True)
class Comparison:
    """What `compare.compare` returns.

    Attributes:
        rows: the compared rows, in the order of the results file.
        results, baseline: paths of the two files.
        against: the baseline rows, in words.
        skipped: rows that could not be compared, each with the reason.
        overridden: rows whose different settings were forced, each with one of them.
        resamples: of the bootstrap.
        margin: acceptable loss in percent of the scale, or None.
    """

    rows: tuple[ComparedRow, ...]
    results: str
    baseline: str
    against: str
    skipped: tuple[tuple[Row, str], ...]
    overridden: tuple[tuple[Row, str], ...]
    resamples: int
    margin: float | None

    @property
    def left_out(self) -> tuple[str, ...]:
        """A line per row that could not be compared; many of one reason stand in one line."""
        return tuple(_once_a_reason(self.skipped))

    @property
    def forced(self) -> tuple[str, ...]:
        """A line per different setting that was overridden."""
        return tuple(f"{label(row)}: {line}" for row, line in self.overridden)

    def of(self, method: str | None, ratio: float | None) -> Comparison:
        """Only what is about one method and ratio asked; None is any. Corrections stay those of the whole."""

        def fits(other: str, share: float | None) -> bool:
            return method in (None, other) and ratio in (None, share)

        return replace(
            self,
            rows=tuple(row for row in self.rows if fits(row.method, row.ratio_asked)),
            skipped=tuple(one for one in self.skipped if fits(one[0]["method"], one[0]["ratio_asked"])),
            overridden=tuple(one for one in self.overridden if fits(one[0]["method"], one[0]["ratio_asked"])),
        )

    def limits_named(self) -> Comparison:
        """Where some rows asked part of a benchmark only, their settings say so, so that no two share a name."""
        if len({row.limit for row in self.rows}) == 1:
            return self

        def named(row: ComparedRow) -> ComparedRow:
            limit = f"first {row.limit}" if row.limit else "all rows"
            return replace(row, settings=", ".join(filter(None, (row.settings, limit))))

        return replace(self, rows=tuple(map(named, self.rows)))

    def to_frame(self) -> pd.DataFrame:
        """One line per row, columns as in `ComparedRow.record`."""
        import pandas as pd

        return pd.DataFrame([row.record() for row in self.rows])

    def write_csv(self, path: str | Path) -> None:
        """One line per row, columns as in `ComparedRow.record`; missing values are empty. Atomic.

        People may open it (`files.as_shown`).
        """
        with atomic_write(path) as stream:
            self.to_csv(stream)

    def to_csv(self, stream: IO[str]) -> None:
        """As `write_csv`, into an open file."""
        records = [row.record() for row in self.rows]
        writer = csv.DictWriter(stream, records[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _shown(value) for name, value in record.items()} for record in records)

    def to_terminal(self, width: int | None = None) -> str:
        """The table and its footer as plain text; no line is longer than ``width``, by default the terminal's."""
        from ivcp_eval.reports import terminal

        return terminal.render(self, width)

    def to_markdown(self) -> str:
        """The table and its footer as Markdown."""
        from ivcp_eval.reports import terminal

        return terminal.render_markdown(self)

    def __str__(self) -> str:
        return self.to_terminal()

    @property
    def meaningless(self) -> bool:
        """Whether some row was made with random weights."""
        return any(not row.trained_weights for row in self.rows)


def _once_a_reason(skipped: Sequence[tuple[Row, str]]) -> list[str]:
    """``LABEL: REASON``; many of one reason stand in one line."""
    labels: dict[str, list[str]] = {}
    for row, reason in skipped:
        labels.setdefault(reason, []).append(label(row))
    lines = []
    for reason, names in labels.items():
        shown = names if len(names) <= 3 else [f"{names[0]} and {len(names) - 1} more"]
        lines += [f"{name}: {reason}" for name in shown]
    return lines


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return as_shown(value)
    return "" if value != value else value  # NaN
