"""A finished comparison: its rows, its table for the terminal and for Markdown, its CSV."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ivcp_eval.files import as_shown, atomic_write

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LOUD", "ComparedRow", "Comparison"]

LOUD = "!!! RANDOM WEIGHTS: these accuracies mean nothing. Only token counts and times are real. !!!"


@dataclass(frozen=True)
class ComparedRow:
    """One (model, benchmark, metric, variant) against its baseline. Missing: NaN, None or an empty text.

    Differences are pruned - baseline in the unit of the score; ``*_percent`` are percent; ``ratio_*`` shares of the
    visual tokens (``ratio_asked`` of ``budget``, where one was held; ``ratio_flops`` of the prefill's FLOPs);
    ``*_time_ratio`` pruned / baseline (below 1 is faster).
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
    prefill_time_ratio: float
    decode_time_ratio: float
    trained_weights: bool
    budget: str = ""
    ratio_method: float = math.nan
    ratio_flops: float = math.nan
    notes: tuple[str, ...] = ()
    paired: bool = False
    difference_low: float = math.nan
    difference_high: float = math.nan
    retained_percent_low: float = math.nan
    retained_percent_high: float = math.nan
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
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
    verdict: str = ""

    @property
    def variant(self) -> str:
        """Method, preset, and ratio or budget, as people say it."""
        ratio = "" if self.method == "none" or math.isnan(self.ratio_asked) else f"{self.ratio_asked:g}"
        ratio += f" of {self.budget}" if ratio and self.budget else ""
        return " ".join(part for part in (self.method, self.preset, ratio) if part)

    @property
    def where(self) -> str:
        """What the row is about, for notes."""
        return f"{self.model} {self.benchmark} {self.metric} {self.variant}"


@dataclass(frozen=True)
class Comparison:
    """What `compare.compare` found.

    Attributes:
        rows: the compared rows, in the order of the results file.
        results, baseline: paths of the two files.
        left_out: rows that could not be compared, with the reason.
        forced: differences in the making that were overridden.
        resamples: of the bootstrap.
        margin: acceptable loss in percent of the scale, or None.
    """

    rows: tuple[ComparedRow, ...]
    results: str
    baseline: str
    left_out: tuple[str, ...]
    forced: tuple[str, ...]
    resamples: int
    margin: float | None

    def to_frame(self) -> pd.DataFrame:
        """One line per row, columns as in `ComparedRow`, notes joined by ``; ``."""
        import pandas as pd

        records = [dataclasses.asdict(row) | {"notes": "; ".join(row.notes)} for row in self.rows]
        return pd.DataFrame(records, columns=[field.name for field in dataclasses.fields(ComparedRow)])

    def write_csv(self, path: str | Path) -> None:
        """`to_frame` as CSV that people may open (`files.as_shown`), atomically."""
        with atomic_write(path) as stream:
            shown = self.to_frame().map(lambda cell: as_shown(cell) if isinstance(cell, str) else cell)
            shown.to_csv(stream, index=False, lineterminator="\n")

    def to_terminal(self) -> str:
        """The table and its footer as plain text."""
        return self._rendered("simple", "")

    def to_markdown(self) -> str:
        """The table and its footer as Markdown."""
        return self._rendered("github", "- ")

    def __str__(self) -> str:
        return self.to_terminal()

    def footer(self) -> list[str]:
        """What must be known to read the table, one statement per line."""
        lines = [*_what_is_paired(self.rows, self.resamples), *_corrections(self.rows, self.resamples)]
        lines += _noise(self.rows)
        lines += [
            "Flips: answers that turned right -> wrong / wrong -> right (where answers are graded: score fell / rose).",
            "Cost: share asked for / of the prompt's visual tokens alive after the last cut / mean over the prefill's "
            "layers / in the KV cache / of the prefill's FLOPs in the decoder; all but the first are measured.",
        ]
        if self.margin is not None:
            lines.append(f"Verdict: not worse means a loss below {self.margin:g} % of the scale, one-sided 2.5 %.")
        lines += _mean_retained(self.rows)
        lines += [f"FORCED although unlike: {line}" for line in self.forced]
        lines += _grouped_notes(self.rows)
        lines += [f"Not compared: {line}" for line in self.left_out]
        return lines

    @property
    def meaningless(self) -> bool:
        """Whether some row was made with random weights."""
        return any(not row.trained_weights for row in self.rows)

    def _rendered(self, style: str, bullet: str) -> str:
        from tabulate import tabulate

        loud = [LOUD, ""] if self.meaningless else []
        cells = [_cells(row, self.margin is not None) for row in self.rows]
        # Cells are text already: tabulate must not turn "0.50" into 0.5.
        table = tabulate(
            [list(c.values()) for c in cells], headers=list(cells[0]), tablefmt=style, disable_numparse=True
        )
        title = f"{self.results} against {'its unpruned rows' if self.results == self.baseline else self.baseline}"
        footer = [bullet + line for line in self.footer()]
        return "\n".join([title, "", *loud, table, "", *footer, *(["", LOUD] if loud else [])])


def _cells(row: ComparedRow, with_verdict: bool) -> dict[str, str]:
    digits = 3 if row.score_scale <= 1 else 1
    interval = f"[{row.difference_low:+.{digits}f}, {row.difference_high:+.{digits}f}]"
    if math.isnan(row.difference_low):
        interval = "none"
    mark = "*" if row.p_holm < 0.05 else ""
    ratios = (row.ratio_asked, row.ratio_kept_final, row.ratio_layer_mean, row.ratio_kv_cache, row.ratio_flops)
    cells = {
        "model": row.model,
        "benchmark": row.benchmark,
        "metric": row.metric,
        "variant": row.variant,
        "baseline": f"{row.score_baseline:.{digits}f}",
        "pruned": f"{row.score_pruned:.{digits}f}{mark}",
        "retained %": _number(row.retained_percent, 1),
        "95 % of difference": interval + ("" if row.paired else " unpaired"),
        "flips": f"{row.right_to_wrong} / {row.wrong_to_right}" if row.paired else "-",
        "asked / final / layers / KV / FLOPs": " / ".join(_number(ratio, 2) for ratio in ratios),
        "prefill time": _number(row.prefill_time_ratio, 2) + ("x" if row.prefill_time_ratio > 0 else ""),
    }
    return cells | ({"verdict": row.verdict} if with_verdict else {})


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _what_is_paired(rows: Sequence[ComparedRow], resamples: int) -> list[str]:
    paired = sum(row.paired for row in rows)
    lines = []
    if paired:
        lines.append(
            f"Paired: {paired} of {len(rows)} rows, sample by sample; 95 % intervals from {resamples} bootstrap "
            "resamples of clusters (samples that share an image or a question)."
        )
    if paired < len(rows):
        lines.append(
            f"Unpaired: {len(rows) - paired} of {len(rows)} rows. Their intervals come from totals and are much wider: "
            "they cannot know which samples both models got right, and take samples as independent."
        )
    return lines


def _corrections(rows: Sequence[ComparedRow], permutations: int) -> list[str]:
    tests = sum(not math.isnan(row.p_value) for row in rows)
    if not tests:
        return ["No row could be tested."]
    kinds = ", ".join(sorted({row.test for row in rows if row.test}))
    marked = sum(row.p_holm < 0.05 for row in rows)
    coarse = sum(tests / (1 + permutations) >= 0.05 and row.p_value == 1 / (1 + permutations) for row in rows)
    advice = (
        f" {coarse} rows differ more than in any of {permutations} random permutations, which are too few for {tests} "
        f"tests to show it; compare fewer rows at a time, or pass --resamples {math.ceil(40 * tests / 1e4) * 10_000}."
    )
    return [
        f"* differs from the baseline at 5 % after Holm's correction over {tests} tests ({kinds}): {marked} of "
        f"{len(rows)} rows. Intervals are not corrected. The CSV has Benjamini-Hochberg's values too."
        + advice
        * bool(coarse)
    ]


def _noise(rows: Sequence[ComparedRow]) -> list[str]:
    """In percent of each scale, so that benchmarks of different scales can be named together."""
    shares = [100 * row.minimal_detectable_effect / row.score_scale for row in rows]
    shares = [share for share in shares if not math.isnan(share)]
    if not shares:
        return []
    span = " to ".join(dict.fromkeys(f"{share:.2g}" for share in (min(shares), max(shares))))
    return [
        f"Noise: a true difference below {span} % of the scale would have been missed more often than in one run of "
        "five (80 % power). Intervals cover the choice of samples; not the judge's, the clock's or sampling's noise."
    ]


def _mean_retained(rows: Sequence[ComparedRow]) -> list[str]:
    """The papers' headline number: mean over benchmarks (the first metric of each) of the share retained."""
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        name = row.variant if row.seed is None else f"{row.variant} (seed {row.seed})"
        groups.setdefault((row.model, name), {}).setdefault(row.benchmark, row.retained_percent)
    lines = []
    for (model, variant), by_benchmark in groups.items():
        values = [value for value in by_benchmark.values() if not math.isnan(value)]
        if len(values) > 1:
            mean = sum(values) / len(values)
            lines.append(f"Mean retained, {model} {variant}: {mean:.1f} % over {len(values)} benchmarks.")
    return lines


def _grouped_notes(rows: Sequence[ComparedRow]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            if not note.startswith("differs, forced"):
                groups.setdefault(note, []).append(row.where)
    lines = []
    for note, places in groups.items():
        where = "all rows" if len(places) == len(rows) > 1 else "; ".join(places[:3])
        more = f"; and {len(places) - 3} more" if len(places) > 3 and where != "all rows" else ""
        lines.append(f"{where}{more}: {note}")
    return lines
