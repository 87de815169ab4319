"""What variants cost where somebody measured it: lines of ``ivcp bench throughput``, joined to a comparison's variants.

A line belongs to a variant of equal method, parameters and ratio on a decoder of equal sizes, its weights stored alike.
The device may be another one than where the answers were made: that is what a bench is for, and every line names it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivcp_eval.files import damage_as_clear_error, read_json
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports.comparison import ComparedRow
from ivcp_eval.reports.csvfile import ResultsError, check_problems, header_of, read_csv
from ivcp_eval.reports.provenance import AGAIN
from ivcp_eval.reports.schema import Column
from ivcp_eval.reports.stats.timing import STAGES, TimeRatio, saving_in_words
from ivcp_eval.reports.table import Row
from ivcp_eval.reports.terminal import fold, time_cell, wrapped

__all__ = [
    "BENCH_COLUMNS",
    "Bench",
    "Costs",
    "Priced",
    "decoder_sizes",
    "join",
    "mebibytes",
    "read_bench",
]

UNPRUNED = "unpruned"


#: Under load: percentiles of the time to first token, waiting included.
_LOADED = ("ttft_p50", "ttft_p95")


def _ratio_columns(stages: Iterable[str], late: bool = False) -> list[Column]:
    """The fields of a `TimeRatio` for every stage."""
    ends = {"ratio": "unpruned model's in the same round", "low": "lower end of its 95 %", "high": "upper end"}
    return [
        Column(f"{stage}_{end}", "number", f"{stage}: time over the {text}", low=0, late=late)
        for stage in stages
        for end, text in ends.items()
    ]


#: Of the CSV that ``ivcp bench throughput --out`` writes: a line per variant and number of requests at a time.
BENCH_COLUMNS: tuple[Column, ...] = (
    Column("method", "text", "pruning method; `none` is the unpruned model"),
    Column("method_parameters", "json", "all parameters of the method; keys sorted, no spaces"),
    Column("ratio", "number", "retention ratio", low=0, high=1),
    Column("decoder", "json", "sizes of the decoder, whose weights are random", required=True),
    Column("quantised", "text", "how weights are stored; empty: as they are"),
    Column("device", "text", "accelerator name, or `cpu`", required=True),
    Column("host", "text", "processor and threads"),
    Column("dtype", "text", "weights and activations"),
    Column("attention", "text", "attention kernel"),
    Column("torch_version", "text", "PyTorch"),
    Column("transformers_version", "text", "transformers"),
    Column("visual_tokens", "integer", "of a request", low=1),
    Column("text_tokens", "integer", "of a request", low=0),
    Column("new_tokens", "integer", "of an answer, on average", low=1),
    Column("batch", "integer", "requests at a time: clients with one under way", low=1),
    Column("rounds", "integer", "measurements of each variant, interleaved", low=1),
    Column("requests_per_s", "number", "answered requests per second, median over rounds", low=0),
    Column("vision_ms", "number", "vision encoder, a whole batch", low=0),
    Column("prefill_ms", "number", "prefill of the decoder, likewise", low=0),
    Column("ttft_ms", "number", "both: from the beginning of a batch until its first tokens are there", low=0),
    Column("decode_ms_per_token", "number", "one decoding step, likewise", low=0),
    Column("kv_bytes", "integer", "KV cache after the prefill, likewise", low=0),
    Column("peak_bytes", "integer", "most memory of the accelerator, weights included", low=0),
    *_ratio_columns(STAGES),
    Column("note", "text", "why there is no measurement"),
    Column("spread", "number", "how far answers are shorter or longer, as a share", low=0, high=1, late=True),
    Column("requests", "integer", "answered in a round", low=1, late=True),
    Column("most_in_batch", "integer", "requests that are answered as one batch, at most", low=1, late=True),
    Column(
        "ttft_p50_ms", "number", "from sending a request to its first token, waiting included: median", low=0, late=True
    ),
    Column("ttft_p95_ms", "number", "likewise: 95th percentile", low=0, late=True),
    *_ratio_columns(_LOADED, late=True),
    Column(
        "bandwidth_gb_s", "number", "10^9 bytes per second that the device reads and writes in a copy", low=0, late=True
    ),
    Column(
        "prefill_memory_ms",
        "number",
        "prefill: what reading weights and writing the cache takes at least",
        low=0,
        late=True,
    ),
    Column("decode_memory_ms", "number", "one decoding step: what reading weights and cache takes", low=0, late=True),
)

_ALWAYS = ("method", "ratio", "visual_tokens", "text_tokens", "new_tokens", "batch", "rounds")  # with a measurement


@dataclass(frozen=True)
class Bench:
    """One measured line of ``batch`` clients. Times and bytes are of a whole batch of requests; None: not measured.

    Attributes:
        parameters: canonical JSON. decoder: sizes, as `DecoderShape` has them.
        ttft_p50_ms, ttft_p95_ms: of single requests, waiting included.
        prefill_memory_ms, decode_memory_ms: what memory traffic alone takes.
        times: stage -> over the unpruned model's, paired by round.
    """

    method: str
    parameters: str
    ratio: float
    decoder: Mapping[str, Any]
    quantised: str
    device: str
    host: str
    dtype: str
    attention: str
    visual_tokens: int
    text_tokens: int
    new_tokens: int
    spread: float | None
    batch: int
    most_in_batch: int | None
    rounds: int
    requests_per_s: float
    ttft_ms: float | None
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    prefill_ms: float | None
    prefill_memory_ms: float | None
    decode_ms_per_token: float | None
    decode_memory_ms: float | None
    kv_bytes: int | None
    peak_bytes: int | None
    times: Mapping[str, TimeRatio]

    @property
    def requests_per_hour(self) -> float:
        """Of one device."""
        return 3600 * self.requests_per_s

    @property
    def measured_on(self) -> str:
        """Device and request, in words."""
        device = self.host if self.device == "cpu" and self.host else self.device
        spread = f" (+/- {100 * self.spread:.0f} %)" if self.spread else ""
        most = self.most_in_batch or self.batch
        batches = f", at most {most} in a batch" if most < self.batch else ""
        return (
            f"{device}, {self.dtype}, {self.attention}; {self.visual_tokens} visual and {self.text_tokens} text tokens "
            f"in, {self.new_tokens} out{spread}{batches}"
        )


@dataclass(frozen=True)
class Priced:
    """A bench line of a variant.

    Attributes:
        words: what became of the saved tokens; empty for the unpruned model.
    """

    model: str
    variant: str
    bench: Bench
    words: str = ""


@dataclass(frozen=True)
class Costs:
    """What `join` returns.

    Attributes:
        lines: of each model, place by place, the unpruned model first. remarks: each with the model and the variant
            that it is about, which is empty where it is all of the model's. files: that were read.
    """

    lines: tuple[Priced, ...]
    remarks: tuple[tuple[str, str, str], ...]
    files: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """Variants without a line, and why; what to know of the others."""
        return tuple(text for *_, text in self.remarks)

    def of(self, variants: Collection[tuple[str, str]]) -> Costs | None:
        """Only what is about these (model, variant) and the unpruned model beside them; None where nothing is."""
        places = {(one.model, _place(one.bench)) for one in self.lines if (one.model, one.variant) in variants}
        lines = tuple(
            one
            for one in self.lines
            if (one.model, one.variant) in variants
            or (one.variant == UNPRUNED and (one.model, _place(one.bench)) in places)
        )
        models = {model for model, _ in variants}
        remarks = tuple(one for one in self.remarks if one[:2] in variants or (one[0] in models and not one[1]))
        return Costs(lines, remarks, self.files) if lines or remarks else None

    def best(self, model: str, variant: str) -> Priced | None:
        """The line of most requests per hour, where all variants of the model that have lines were measured: with the
        same request on the same device, the first such in the files; None where there is no such place."""
        places: dict[str, set[str]] = {}
        for one in self.lines:
            if one.model == model and one.variant != UNPRUNED:
                places.setdefault(one.bench.measured_on, set()).add(one.variant)
        every = set[str]().union(*places.values())
        common = next((place for place, there in places.items() if there == every), None)
        own = [one for one in self.lines if (one.model, one.variant, one.bench.measured_on) == (model, variant, common)]
        return max(own, key=lambda one: one.bench.requests_per_s, default=None)

    def to_terminal(self, width: int | None = None) -> str:
        """A table per place of measurement, and the notes."""
        parts = [f"Cost, measured by `ivcp bench throughput` with random weights ({', '.join(self.files)})"]
        places: dict[str, list[Priced]] = {}
        for one in self.lines:
            places.setdefault(one.bench.measured_on, []).append(one)
        for place, some in places.items():
            columns = {name: [make(one) for one in some] for name, make in _SHOWN.items()}
            columns = {name: cells for name, cells in columns.items() if any(cells)}
            parts += [wrapped(place, width), fold(columns, ("model", "variant"), "in words", width)]
        return "\n\n".join([*parts, *(["\n".join(wrapped(note, width) for note in self.notes)] if self.notes else [])])

    def to_json(self) -> list[dict[str, Any]]:
        """One object per line."""
        return [
            {
                **{"model": one.model, "variant": one.variant, "measured_on": one.bench.measured_on},
                **{"at_a_time": one.bench.batch, "requests_per_hour": one.bench.requests_per_hour},
                **{name: getattr(one.bench, name) for name in _MILLISECONDS},
                **{"kv_bytes": one.bench.kv_bytes, "peak_bytes": one.bench.peak_bytes, "words": one.words},
            }
            for one in self.lines
        ]


def mebibytes(value: float | None) -> str:
    """``12.5 MiB``; empty for None and NaN."""
    return "" if value is None or math.isnan(value) else f"{value / 2**20:.1f} MiB"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


_MILLISECONDS = (
    *("ttft_ms", "ttft_p50_ms", "ttft_p95_ms", "prefill_ms", "prefill_memory_ms"),
    *("decode_ms_per_token", "decode_memory_ms"),
)
_SHOWN: dict[str, Any] = {
    "model": lambda one: one.model,
    "variant": lambda one: one.variant,
    "at a time": lambda one: str(one.bench.batch),
    "requests/h": lambda one: f"{one.bench.requests_per_hour:.0f}",
    "time of a request": lambda one: time_cell(one.bench.times["end_to_end"]),
    "first token p50 ms": lambda one: _ms(one.bench.ttft_p50_ms),
    "p95": lambda one: _ms(one.bench.ttft_p95_ms),
    "of a batch ms": lambda one: _ms(one.bench.ttft_ms),
    "prefill ms": lambda one: _ms(one.bench.prefill_ms),
    "memory alone ms": lambda one: _ms(one.bench.prefill_memory_ms),
    "decode ms/token": lambda one: _ms(one.bench.decode_ms_per_token),
    "memory alone": lambda one: _ms(one.bench.decode_memory_ms),
    "KV": lambda one: mebibytes(one.bench.kv_bytes),
    "peak": lambda one: mebibytes(one.bench.peak_bytes),
    "in words": lambda one: one.words,
}


def read_bench(path: Path) -> list[Bench]:
    """The measured lines of a CSV of ``ivcp bench throughput``; those that only say why there is none are left out.

    Raises:
        FileNotFoundError: there is no such file. ResultsError: another kind of file, damage, or nothing measured.
    """
    if missing := [name for name in ("method", "decoder", "requests_per_s") if name not in header_of(path)]:
        raise ResultsError(
            f"{path} has no column {', '.join(missing)}: costs are read from what `ivcp bench throughput --out` writes"
        )
    found, problems = [], []
    for number, row in read_csv(path, BENCH_COLUMNS):
        if row["requests_per_s"] is None:
            continue
        if empty := [name for name in _ALWAYS if row[name] in (None, "")]:
            problems.append(f"line {number}: a measurement without {', '.join(empty)}")
            continue
        values = {name: row[name] for name in row if name in Bench.__dataclass_fields__}
        times = {stage: _time(row, stage) for stage in (*STAGES, *_LOADED)}
        own = {"parameters": row["method_parameters"] or "{}", "decoder": json.loads(row["decoder"]), "times": times}
        found.append(Bench(**{**values, **own}))
    check_problems(path, problems)
    if not found:
        raise ResultsError(f"{path} has no line with a measurement; its column `note` says why")
    return found


def _time(row: Row, stage: str) -> TimeRatio:
    ends = (row[f"{stage}_{end}"] for end in ("ratio", "low", "high"))
    ratio, low, high = (math.nan if end is None else end for end in ends)
    return TimeRatio(ratio, low, high, row["rounds"])


def join(rows: Sequence[ComparedRow], results: Path, table: Sequence[Row], given: Sequence[Path] = ()) -> Costs | None:
    """The bench lines of every variant in ``rows``, and the unpruned model's of the same places.

    Args:
        rows: of a comparison. results, table: its results file and what that holds.
        given: bench files; none: ``<results>.cost.csv`` where that lies beside the results, else there are no costs.
            Equal lines, of a file named twice or of its copy, count once.

    Raises:
        As `read_bench`; ResultsError: no line of the given files belongs to any variant; it says what differs.
    """
    beside = results.with_suffix(".cost.csv")
    files = given or ([beside] if beside.is_file() else [])
    if not files:
        return None
    files = list({path.resolve(): path for path in files}.values())
    lines: list[Bench] = []
    for path in files:
        lines += [line for line in read_bench(path) if line not in lines]
    variants: dict[tuple[str, str], ComparedRow] = {}
    for row in rows:
        if row.method not in (BASELINE, AGAIN):
            variants.setdefault((row.model, row.variant), row)
    priced: list[Priced] = []
    remarks: list[tuple[str, str, str]] = []
    for model in dict.fromkeys(model for model, _ in variants):
        facts = _Facts.of(model, results, table)
        own: list[Priced] = []
        for (_, variant), row in (item for item in variants.items() if item[0][0] == model):
            some, why = _belonging(row, lines, facts)
            remarks += [(model, variant, f"No cost of {model} {variant}: {why}.")] if why else []
            own += [Priced(model, variant, one, saving_in_words(row.ratio_layer_mean, one.times)) for one in some]
        for place in dict.fromkeys(_place(one.bench) for one in own):
            here = [line for line in lines if _place(line) == place]
            priced += [Priced(model, UNPRUNED, line) for line in here if line.method == BASELINE]
            priced += [one for one in own if _place(one.bench) == place]
        remarks += [(model, "", text) for text in facts.remarks([one.bench for one in own])]
    if not priced and given:
        reasons = "\n  ".join(text for *_, text in remarks) or "the comparison has no pruned variant"
        raise ResultsError(
            f"no line of {', '.join(map(str, files))} belongs to a variant of {results}:\n  {reasons}\n"
            f"`ivcp bench throughput --of {results} --out NAME` measures what it holds"
        )
    return Costs(tuple(priced), tuple(remarks), tuple(path.as_posix() for path in files))


def _place(line: Bench) -> tuple[str, str, int]:
    """What lines share that are measured side by side."""
    return json.dumps(line.decoder, sort_keys=True), line.measured_on, line.batch


@dataclass(frozen=True)
class _Facts:
    """Of one model in a results file: sizes of its decoder where they are known, how weights are stored, device."""

    model: str
    decoder: Mapping[str, Any] | None
    quantised: str
    device: str

    @classmethod
    def of(cls, model: str, results: Path, table: Sequence[Row]) -> _Facts:
        own = [row for row in table if row["model"] == model]
        known = (decoder_sizes(results.parent / row["predictions"]) for row in own if row["predictions"])
        kind = own[0]["quantised"].partition(" ")[0]
        return cls(model, next(filter(None, known), None), kind, own[0]["device"])

    def remarks(self, lines: Sequence[Bench]) -> list[str]:
        if not lines:
            return []
        said = []
        if self.decoder is None:
            said.append(f"The results do not say the sizes of {self.model}'s decoder; the bench's are taken for them.")
        other_devices = sorted({line.device for line in lines} - {self.device})
        if self.device and other_devices:
            said.append(f"{self.model} was evaluated on {self.device}; its cost is that on {', '.join(other_devices)}.")
        return said


def _belonging(row: ComparedRow, lines: Sequence[Bench], facts: _Facts) -> tuple[list[Bench], str]:
    """The lines of a variant; else why there are none: the first thing that leaves no line."""
    ratio = row.ratio_method if row.budget else row.ratio_asked
    parameters = row.method_parameters or "{}"
    steps: list[tuple[str, Any, Any]] = [
        ("method", row.method, lambda line: line.method == row.method),
        ("ratio", f"{ratio:g}", lambda line: math.isclose(line.ratio, ratio, abs_tol=1e-6)),
        ("parameters", parameters, lambda line: line.parameters == parameters),
        ("weights", facts.quantised or "as they are", lambda line: line.quantised.partition(" ")[0] == facts.quantised),
        ("decoder", facts.decoder, lambda line: _same_sizes(facts.decoder, line.decoder)),
    ]
    left = list(lines)
    for what, expected, fits in steps:
        before, left = left, [line for line in left if fits(line)]
        if not left:
            there = dict.fromkeys(_said(what, line) for line in before if line.method != BASELINE)
            shown = "; ".join(there) or "the unpruned model only"
            verb = "are" if what.endswith("s") else "is"
            return [], f"its {what} {verb} {_sizes(expected) if what == 'decoder' else expected}, the bench has {shown}"
    return left, ""


def _said(what: str, line: Bench) -> str:
    if what == "decoder":
        return _sizes(line.decoder)
    if what == "ratio":
        return f"{line.ratio:g}"
    return str({"weights": line.quantised or "as they are"}.get(what) or getattr(line, what))


def _sizes(decoder: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {value}" for name, value in (decoder or {}).items() if value not in (None, []))


def _same_sizes(known: Mapping[str, Any] | None, measured: Mapping[str, Any]) -> bool:
    """Whether no size that both state differs."""
    return all(measured[name] == value for name, value in (known or {}).items() if name in measured)


def decoder_sizes(predictions: Path) -> dict[str, Any] | None:
    """The sizes of the decoder that stand beside a per-sample CSV; None where they do not.

    Raises:
        DamagedError: the file beside it holds something else.
    """
    path = predictions.with_name("cell.json")
    if not path.is_file():
        return None
    advice = "the next run writes it again; the answers are kept"
    found = read_json(path, advice).get("decoder")
    with damage_as_clear_error(path, advice):
        if found and not all(isinstance(found[name], int) for name in ("layers", "kv_heads", "head_dim")):
            raise TypeError("sizes that are no whole numbers")
        return dict(found) if found else None
