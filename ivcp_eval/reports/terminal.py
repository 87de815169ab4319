"""Tables that fold to the terminal's width; the comparison as one, as Markdown, and what must be known to read it."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ivcp_eval.benchmarks import agreement, headline
from ivcp_eval.benchmarks.published import AVERAGES
from ivcp_eval.interface.variants import BASELINE

if TYPE_CHECKING:  # numpy, which other tables can do without
    from ivcp_eval.reports.comparison import ComparedRow, Comparison, NoiseFloor
    from ivcp_eval.reports.stats.timing import TimeRatio

__all__ = [
    "FLOOR",
    "LOUD",
    "flips_cell",
    "floor_text",
    "fold",
    "footer",
    "render",
    "render_markdown",
    "time_cell",
    "time_lost",
    "times_note",
    "wrapped",
]

LOUD = "!!! RANDOM WEIGHTS: these accuracies mean nothing. Only token counts and times are real. !!!"
FLOOR = (
    "A/A: difference of the unpruned model's second answers to its first (answers whose text changed), each sample "
    "alone, and with what is named. Differences of that size are no effect of pruning."
)
#: Lines of a table into a pipe or file are as long as this at most.
_WIDTH = 120
_NARROWEST = 40
#: Prose is not broken into lines shorter than this to keep it beside the other columns.
_PROSE = 24
#: No column is narrower than this for lack of room.
_SHORTEST = 8
#: These name a row; one that is the same in all rows is said once, above the table.
_NAMES = ("model", "benchmark", "metric", "variant")
_GAP = "  "


def fold(
    columns: Mapping[str, Sequence[str]], names: Sequence[str] = (), prose: str = "", width: int | None = None
) -> str:
    """Columns side by side under their headings; no line is longer than ``width``.

    Args:
        columns: heading -> its cells. names: headings of the columns that name a row. Columns that find no room stand
            in further tables below, each with these.
        prose: heading of a column whose cells may be broken into lines, so that it fits beside the others.
        width: by default the terminal's, else 120; at least 40.
    """
    width, columns = _checked(width), dict(columns)
    if prose:
        taken = {name: _width(name, column) + len(_GAP) for name, column in columns.items() if name != prose}
        room = width - sum(taken.values())
        if room < _PROSE:  # it goes below, beside the names alone
            room = max(width // 2, width - sum(taken[name] for name in names))
        columns[prose] = [_broken(cell, room) for cell in columns[prose]]
    named = {name: columns.pop(name) for name in names}
    return "\n\n".join(_folded(named, columns, width))


def render(comparison: Comparison, width: int | None = None) -> str:
    """Table and footer; no line is longer than ``width`` (by default the terminal's, else 120)."""
    width = _checked(width)
    cells = _table(comparison)
    same = {name: c[0] for name, c in cells.items() if name in _NAMES and len(set(c)) == 1 and len(comparison.rows) > 1}
    names = {name: column for name, column in cells.items() if name in _NAMES and name not in same}
    values = {name: column for name, column in cells.items() if name not in _NAMES}
    lines = [_title(comparison)]
    lines += [", ".join(f"{name} {value}" for name, value in same.items())] if same else []
    lines_of = partial(wrapped, width=width, break_long_words=True)
    head = [lines_of(text) for text in lines]
    loud = [lines_of(LOUD)] if comparison.meaningless else []
    blocks = [text for block in _folded(names, values, width) for text in (block, "")]
    notes = [lines_of(text, hanging="  ") for text in footer(comparison)]
    return "\n".join([*head, "", *loud, *([""] if loud else []), *blocks, *notes, *(["", *loud] if loud else [])])


def render_markdown(comparison: Comparison) -> str:
    """One table, however wide, and the footer as a list."""
    from tabulate import tabulate

    cells = _table(comparison)
    # Cells are text already: tabulate must not turn "0.50" into 0.5.
    table = tabulate(cells, headers="keys", tablefmt="github", disable_numparse=True)
    loud = [LOUD, ""] if comparison.meaningless else []
    notes = [f"- {line}" for line in footer(comparison)]
    return "\n".join([_title(comparison), "", *loud, table, "", *notes, *(["", LOUD] if loud else [])])


def wrapped(
    text: str, width: int | None = None, indent: str = "", hanging: str = "", break_long_words: bool = False
) -> str:
    """Prose in lines of ``width`` (as `fold`); an address or path stays in one piece, so that it can be copied.

    Args:
        indent: before every line. hanging: also before every line but the first.
        break_long_words: no line is longer than ``width`` then, whatever stands in it.
    """
    return textwrap.fill(
        text,
        _checked(width),
        initial_indent=indent,
        subsequent_indent=indent + hanging,
        break_on_hyphens=False,
        break_long_words=break_long_words,
    )


def _title(comparison: Comparison) -> str:
    file = "its" if comparison.results == comparison.baseline else f"{comparison.baseline}'s"
    return f"{comparison.results} against {file} {comparison.against}"


def _checked(width: int | None) -> int:
    return max(_NARROWEST, width or shutil.get_terminal_size((_WIDTH, 24)).columns)


def _folded(names: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]], width: int) -> list[str]:
    """As few tables under each other as fit, each with the names of the rows; no column of values is torn apart."""
    widest = max((_width(name, column) for name, column in values.items()), default=0)
    names = _narrowed(names, max(10, width - widest))
    taken = sum(_width(name, column) + len(_GAP) for name, column in names.items())
    blocks: list[dict[str, Sequence[str]]] = [{}]
    room = width - taken
    for name, column in values.items():
        alone = max(_SHORTEST, width - taken)
        if _width(name, column) > alone:
            name, column = _broken(name, alone), [_broken(cell, alone) for cell in column]
        needed = _width(name, column)
        if blocks[-1] and needed > room:
            blocks.append({})
            room = width - taken
        blocks[-1][name] = column
        room -= needed + len(_GAP)
    return [_plain({**names, **block}) for block in blocks]


def _plain(columns: Mapping[str, Sequence[str]]) -> str:
    """Columns side by side under their names; a cell may have several lines."""
    widths = [_width(name, column) for name, column in columns.items()]
    rows = [list(columns), ["-" * width for width in widths], *map(list, zip(*columns.values(), strict=True))]
    lines = []
    for row in rows:
        cells = [cell.split("\n") for cell in row]
        for number in range(max(map(len, cells))):
            parts = [cell[number] if number < len(cell) else "" for cell in cells]
            lines.append(_GAP.join(part.ljust(width) for part, width in zip(parts, widths, strict=True)).rstrip())
    return "\n".join(lines)


def _width(name: str, column: Sequence[str]) -> int:
    return max(len(line) for cell in (name, *column) for line in cell.split("\n"))


def _narrowed(names: Mapping[str, Sequence[str]], width: int) -> dict[str, Sequence[str]]:
    """Names broken into several lines where they would leave no room for a value; the longest column gives way."""
    limits = {name: _width(name, column) for name, column in names.items()}
    while limits and sum(limits.values()) + len(_GAP) * len(limits) > width and max(limits.values()) > _SHORTEST:
        limits[max(limits, key=lambda name: limits[name])] -= 1
    return {
        _broken(name, limits[name]): [_broken(cell, limits[name]) for cell in column] for name, column in names.items()
    }


def _broken(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _table(comparison: Comparison) -> dict[str, list[str]]:
    """Column -> its cells; columns in which no row has anything are left out."""
    rows = comparison.rows
    makers: dict[str, Callable[[ComparedRow], str]] = {
        "model": lambda row: row.model,
        "benchmark": lambda row: row.benchmark,
        "metric": lambda row: row.metric,
        "variant": lambda row: row.variant,
        "baseline": lambda row: f"{row.score_baseline:.{_digits(row)}f}",
        "pruned": lambda row: f"{row.score_pruned:.{_digits(row)}f}" + ("*" if row.p_holm < 0.05 else ""),
        "difference [95 %]": _difference,
        "n": lambda row: "-" if row.n_samples is None else str(row.n_samples),
        "limit": lambda row: "" if row.limit is None else str(row.limit),
        "seeds: range": _seeds,
        "retained %": lambda row: _number(row.retained_percent, 1),
        "flips": flips_cell,
        "rank": _rank,
        "A/A": _noise_floor,
        "final": lambda row: _number(row.ratio_kept_final, 2),
        "layers": lambda row: _number(row.ratio_layer_mean, 2),
        "KV": lambda row: _number(row.ratio_kv_cache, 2),
        "FLOPs": lambda row: _number(row.ratio_flops, 2),
    }
    cells = {name: [make(row) for row in rows] for name, make in makers.items()}
    from ivcp_eval.reports.stats.timing import STAGES

    cells |= {f"{stage.replace('_', ' ')} time": [time_cell(row.times[stage]) for row in rows] for stage in STAGES}
    cells["verdict"] = [row.verdict for row in rows]
    return {name: column for name, column in cells.items() if any(column) or name in _NAMES}


def _digits(row: ComparedRow) -> int:
    return 3 if row.score_scale <= 1 else 1


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _difference(row: ComparedRow) -> str:
    digits = _digits(row)
    interval = f"[{row.difference_low:+.{digits}f}, {row.difference_high:+.{digits}f}]"
    if math.isnan(row.difference_low):
        interval = "[none]"
    return f"{row.difference:+.{digits}f} {interval}" + ("" if row.paired else " unpaired")


def _rank(row: ComparedRow) -> str:
    return "" if row.rank is None else f"{row.rank} [{row.rank_low}, {row.rank_high}]"


def _noise_floor(row: ComparedRow) -> str:
    return "; ".join(floor_text(again, _digits(row)) for again in row.again)


def floor_text(again: NoiseFloor, digits: int, unit: float = 1.0) -> str:
    """``dtype=bfloat16 +0.3 (4)``: in what the second answers were computed otherwise, the difference times ``unit``,
    and answers whose text changed, where these are known.
    """
    if math.isnan(again.difference):
        return ""
    changed = "" if again.answers_changed is None else f" ({again.answers_changed})"
    return f"{again.settings} {unit * again.difference:+.{digits}f}{changed}".strip()


def _seeds(row: ComparedRow) -> str:
    digits = _digits(row)
    spread = f"{row.score_lowest_seed:.{digits}f} to {row.score_highest_seed:.{digits}f}"
    return "" if row.n_seeds == 1 else f"{row.n_seeds}: {spread}"


def flips_cell(row: ComparedRow) -> str:
    """``10 / 4``, with a decimal where they are means over seeds; a dash where samples are not known."""
    if row.right_to_wrong is None or row.wrong_to_right is None:
        return "-"
    digits = 0 if float(row.right_to_wrong).is_integer() and float(row.wrong_to_right).is_integer() else 1
    return f"{row.right_to_wrong:.{digits}f} / {row.wrong_to_right:.{digits}f}"


def time_cell(time: TimeRatio) -> str:
    """``0.72x [0.70, 0.75]``, with a word where the variant is slower; empty if nothing was timed."""
    if not time.n:
        return ""
    interval = "" if math.isnan(time.low) else f" [{time.low:.2f}, {time.high:.2f}]"
    return f"{time.ratio:.2f}x{interval}" + (" slower" if time.low > 1 else "")


def footer(comparison: Comparison) -> list[str]:
    """What must be known to read the table, one statement per line."""
    rows, resamples = comparison.rows, comparison.resamples
    compared_with = "the baseline" if comparison.against == "unpruned rows" else comparison.against
    lines = [*_what_is_paired(rows, resamples), *_corrections(rows, resamples, compared_with), *_noise(rows)]
    lines += _what_flips(rows)
    lines += [
        "Cost, measured: share of the prompt's visual tokens alive after the last cut (final), mean over the prefill's "
        "layers, in the KV cache; of the prefill's FLOPs in the decoder.",
    ]
    if any(row.again for row in rows):
        lines.append(FLOOR)
    if comparison.margin is not None:
        lines.append(f"Verdict: not worse means a loss below {comparison.margin:g} % of the scale, one-sided 2.5 %.")
    if any(row.n_seeds > 1 for row in rows):
        lines.append("Seeds: number, lowest and highest score; score, difference and interval are of their mean.")
    if any(row.rank is not None for row in rows):
        from ivcp_eval.reports.stats.ranks import best_at_equal_cost

        lines.append(
            "Rank: among the variants and the one they are compared with; in brackets, the ranks that the 95 % "
            "intervals allow: only who lies apart counts as better."
        )
        lines += best_at_equal_cost(rows, comparison.against)
    lines += _speed(rows)
    lines += _mean_retained(rows)
    lines += [f"FORCED although settings differ: {line}" for line in comparison.forced]
    lines += _grouped_notes(rows)
    lines += [f"Not compared: {line}" for line in comparison.left_out]
    return lines


def _what_flips(rows: Sequence[ComparedRow]) -> list[str]:
    """Where agreement is measured nobody knows what is right."""
    metrics = dict.fromkeys(row.metric for row in rows)
    agreed = [name for name in metrics if name in agreement.METRICS]
    lines = []
    if len(agreed) < len(metrics):
        lines.append(
            "Flips: answers that turned right -> wrong / wrong -> right (where answers are graded: score fell / rose)."
        )
    if agreed:
        lines.append(
            f"Flips of {', '.join(agreed)}: answers that agree less / more with the unpruned model's, be they right or "
            f"wrong. The score is the {agreement.NOTE}."
        )
    return lines


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


def _corrections(rows: Sequence[ComparedRow], permutations: int, compared_with: str) -> list[str]:
    rows = [row for row in rows if not math.isnan(row.p_holm)]  # the baseline against itself is not corrected for
    tests = len(rows)
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
        f"* differs from {compared_with} at 5 % after Holm's correction over {tests} tests ({kinds}): {marked} of "
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


def times_note(times: Iterable[TimeRatio]) -> str:
    """What the cells of measured times are, and of how many samples; at least one was timed."""
    counts = sorted({time.n for time in times if time.n})
    n = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return (
        f"Times: of the variant over those of the baseline for the same sample in one session, {n} samples; geometric "
        "mean and 95 % interval, below 1 is faster. Decode is per token; end to end from the picture to the last token."
    )


def _speed(rows: Sequence[ComparedRow]) -> list[str]:
    """Whose times were measured, and who is slower than the baseline."""
    timed = [row for row in rows if any(time.n for time in row.times.values())]
    if not timed:
        return []
    slower = [
        f"{row.model} {row.benchmark} {row.variant}, {stage.replace('_', ' ')}: {time_cell(time)}"
        for row in timed
        for stage, time in row.times.items()
        if time.low > 1
    ]
    lines = [times_note(time for row in timed for time in row.times.values()), *time_lost(rows)]
    return lines + [f"Slower than the baseline: {line}" for line in dict.fromkeys(slower)]


def time_lost(rows: Sequence[ComparedRow]) -> list[str]:
    """Which variants save tokens but no time, where the paired times say so."""
    from ivcp_eval.reports.stats.timing import NO_TIME, saving_in_words

    found: dict[str, list[str]] = {}
    for row in rows:
        words = saving_in_words(row.ratio_layer_mean, row.times)
        if NO_TIME in words:
            found.setdefault(f"{row.model} {row.variant}: {words}", []).append(row.benchmark)
    return [f"{words} ({', '.join(dict.fromkeys(where))})" for words, where in found.items()]


def _mean_retained(rows: Sequence[ComparedRow]) -> list[str]:
    """The papers' headline number: mean over benchmarks (the first metric of each) of the share retained."""
    groups: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        groups.setdefault((row.model, row.variant), {}).setdefault(row.benchmark, row.retained_percent)
    lines = []
    for (model, variant), by_benchmark in groups.items():
        values = [value for value in by_benchmark.values() if not math.isnan(value)]
        if len(values) > 1:
            mean = sum(values) / len(values)
            lines.append(f"Mean retained, {model} {variant}: {mean:.1f} % over {len(values)} benchmarks.")
    return [*lines, *_papers_averages(rows)]


def _papers_averages(rows: Sequence[ComparedRow]) -> list[str]:
    """As the IVC-Prune paper averages, of variants with whole rows of all that it averages over."""
    groups: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row.limit is None and row.baseline_method == BASELINE and row.metric == headline(vars(row)):
            groups.setdefault((row.model, row.method, row.variant), {})[row.benchmark] = row.retained_percent
    lines = []
    for average in AVERAGES:
        for (model, method, variant), by_benchmark in groups.items():
            values = [by_benchmark.get(name, math.nan) for name in average.benchmarks]
            if not any(map(math.isnan, values)):
                said = average.published(model, method)
                mean = sum(values) / len(values)
                lines.append(
                    f"As the IVC-Prune paper averages, {average.words}: {model} {variant} retains {mean:.1f} %"
                    + (f" (the paper prints {said})." if said else ".")
                )
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
