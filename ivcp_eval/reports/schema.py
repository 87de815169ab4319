"""The one schema of results: what each column of a results CSV and of a per-sample CSV means, and what may stand in it.

`table.py` reads and writes the files. Missing values are empty cells: ``""`` for text, ``None`` for everything else.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ivcp_eval.interface.records import measured

__all__ = [
    "COLUMNS",
    "COLUMN_NAMES",
    "ROW_COLUMNS",
    "RUN_COLUMNS",
    "SAMPLE_COLUMNS",
    "SAMPLE_COLUMN_NAMES",
    "STATUSES",
    "Column",
    "canonical_json",
    "schema_markdown",
]

Kind = Literal["text", "integer", "number", "boolean", "json", "sha256", "date", "status"]
STATUSES = ("ok", "incomplete", "skipped", "failed")

_KIND_WORDS: dict[str, str] = {
    "text": "text",
    "integer": "a whole number",
    "number": "a finite number",
    "boolean": "true or false",
    "json": "a JSON object",
    "sha256": "64 hexadecimal digits",
    "date": "an ISO 8601 date or time",
    "status": "one of " + ", ".join(STATUSES),
}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: header, with the unit where there is one.
        kind: what its cells hold.
        description: for people; `results/README.md` is generated from it.
        required: an empty cell is an error.
        low, high: limits of a number, both allowed.
        late: files written before the column was added lack it; its cells are then empty.
        of_run: how a row was made. It holds for all rows of a run, so it stands once per run in ``<name>.runs.csv``.
    """

    name: str
    kind: Kind
    description: str
    required: bool = False
    low: float | None = None
    high: float | None = None
    late: bool = False
    of_run: bool = False

    @property
    def allowed(self) -> str:
        """What a cell may hold, in words."""
        limits = [f">= {self.low:g}"] if self.low is not None else []
        limits += [f"<= {self.high:g}"] if self.high is not None else []
        empty = [] if self.required else ["may be empty"]
        return ", ".join([f"{_KIND_WORDS[self.kind]} {' and '.join(limits)}".strip(), *empty])

    def parse(self, text: str) -> Any:
        """A cell's value; raises ValueError (its message says what is allowed) for a bad one."""
        if text == "" or (self.kind != "text" and text.strip() == ""):
            return self._checked("" if self.kind == "text" else None)
        try:
            return self._checked(_PARSERS[self.kind](text))
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{text[:80]!r} is not {self.allowed}") from None

    def cell(self, value: Any) -> str:
        """The text of a value; NaN and None are empty. Raises ValueError for a value that `parse` would refuse."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            text = ""
        elif self.kind == "boolean" and not isinstance(value, str):
            text = "true" if value else "false"
        elif self.kind == "json" and not isinstance(value, str):
            text = canonical_json(value)
        elif self.kind == "number" and not isinstance(value, str):
            text = repr(float(value))
        elif self.kind == "integer" and not isinstance(value, str):
            text = str(int(value)) if int(value) == value else repr(value)
        else:
            text = str(value)
        self.parse(text)
        return text

    def _checked(self, value: Any) -> Any:
        if value in ("", None):
            if self.required:
                raise ValueError(f"an empty cell is not {self.allowed}")
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            below = self.low is not None and value < self.low
            if below or (self.high is not None and value > self.high):
                raise ValueError(f"{value!r} is not {self.allowed}")
        return value


def canonical_json(value: Mapping[str, Any]) -> str:
    """The one text of a JSON object: sorted keys, no spaces, so that equal parameters are equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _json(text: str) -> str:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return canonical_json(value)


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError
    return text


def _date(text: str) -> str:
    datetime.datetime.fromisoformat(text)
    return text


def _status(text: str) -> str:
    if text not in STATUSES:
        raise ValueError
    return text


_PARSERS: dict[str, Any] = {
    "text": str,
    "integer": int,
    "number": _number,
    "boolean": lambda text: _BOOLEANS[text.lower()],
    "json": _json,
    "sha256": _sha256,
    "date": _date,
    "status": _status,
}

COLUMNS: tuple[Column, ...] = (
    Column("model", "text", "short model name, e.g. `qwen25`", required=True),
    Column("checkpoint", "text", "hub repository or folder name of the weights", of_run=True),
    Column("revision", "text", "commit of the checkpoint, or a hash of local weights", of_run=True),
    Column(
        "served",
        "json",
        "the server that answered, and requests under way at once; nothing is then known of weights and kept tokens, "
        "pictures are limited by the server, and `generation` is what was sent to it; empty: answered here",
        late=True,
        of_run=True,
    ),
    Column("family", "text", "model family (file name in `model_adapters/`)", of_run=True),
    Column("method", "text", "pruning method; `none` is the unpruned baseline", required=True),
    Column("method_parameters", "json", "all parameters of the method; keys sorted, no spaces"),
    Column(
        "set_parameters",
        "text",
        "names of the parameters that are neither the method's nor the checkpoint's defaults, separated by spaces",
        late=True,
        of_run=True,
    ),
    Column(
        "method_source",
        "text",
        "code hash, with package and version of a plug-in's method, or the name of a method file; else empty",
        late=True,
        of_run=True,
    ),
    Column("faithfulness", "text", "`faithful`, `from_formula`, `variant` or `control` (see `ivcp list`)", of_run=True),
    Column("preset", "text", "named set of method parameters, e.g. `official`", of_run=True),
    Column("seed", "integer", "seed of the method's random choices"),
    Column(
        "ratio_asked", "number", "share that was asked for, in (0, 1]: of visual tokens, or of `budget`", low=0, high=1
    ),
    Column(
        "budget",
        "text",
        "what was held at `ratio_asked` of the unpruned model: `final`, `layer_mean`, or `flops(V+T)` counted for a "
        "prompt of V visual and T text tokens; empty: the method's own ratio is what was asked for",
        late=True,
    ),
    Column(
        "ratio_method",
        "number",
        "retention ratio that the method was run at; empty: none holds the budget, or not stated",
        low=0,
        high=1,
        late=True,
        of_run=True,
    ),
    Column("ratio_kept_final", "number", "measured share alive after the last cut, mean over samples", low=0, high=1),
    Column(
        "ratio_layer_mean", "number", "measured share alive, mean over decoder layers of the prefill", low=0, high=1
    ),
    Column(
        "ratio_kv_cache", "number", "measured share of visual tokens in the KV cache, mean over layers", low=0, high=1
    ),
    Column(
        "ratio_kv_analytic",
        "number",
        "share of the visual tokens' KV cache that a real implementation would read while decoding, where nothing is "
        "freed here: tokens attended to (measured, mean over layers and steps) or key channels (by formula)",
        low=0,
        high=1,
        late=True,
    ),
    Column(
        "ratio_flops",
        "number",
        "decoder FLOPs of the prefill over those of the unpruned model, from the tokens that each layer was measured "
        "to process (`ivcp_eval/engine/cost/flops.py`)",
        low=0,
        high=1,
        late=True,
    ),
    Column(
        "ratio_flops_analytic",
        "number",
        "`ratio_flops` of a real implementation, where nothing is saved here: pairs of tokens that attention would "
        "look at and tokens that MLPs would process, as measured; empty: the method leaves out neither",
        low=0,
        high=1,
        late=True,
        of_run=True,
    ),
    Column(
        "visual_tokens_prompt_mean",
        "number",
        "visual tokens of the unpruned prompt, mean over samples",
        low=0,
        of_run=True,
    ),
    Column(
        "benchmark", "text", "VLMEvalKit's name, e.g. `MMStar`; `RefCOCO_val`, `RefCOCO+_testA`, ...", required=True
    ),
    Column("limit", "integer", "only the first so many rows of the benchmark were asked; empty: all", low=1, late=True),
    Column("benchmark_sha256", "sha256", "checksum of the benchmark file", of_run=True),
    Column("metric", "text", "name of the metric, e.g. `Overall`, `Acc@0.5`", required=True),
    Column("score", "number", "the metric's value as the benchmark's own evaluation gives it"),
    Column("score_scale", "number", "the metric's largest possible value, e.g. 100 (percent) or 2800 (MME)", low=0),
    Column("n_samples", "integer", "samples that the score is made of", low=0),
    Column("n_clusters", "integer", "independent groups of samples (images, question groups)", low=0),
    Column("n_failed", "integer", "samples without a usable answer (counted as wrong, never dropped)", low=0),
    Column("status", "status", "`ok`, or why there is no comparable score", required=True),
    Column("reason", "text", "in words, if the status is not `ok`; else a remark"),
    Column(
        "prefill_ms_median",
        "number",
        "prefill of the language model, selection included, milliseconds",
        low=0,
        of_run=True,
    ),
    Column("decode_ms_per_token_median", "number", "one decode step, milliseconds", low=0, of_run=True),
    Column("vision_ms_median", "number", "vision encoder, milliseconds", low=0, of_run=True),
    Column(
        "first_token_ms_median",
        "number",
        "of a server: milliseconds until the first token, at the concurrency in `served`",
        low=0,
        late=True,
        of_run=True,
    ),
    Column(
        "requests_per_s",
        "number",
        "of a server: answers per second at the concurrency in `served`",
        low=0,
        late=True,
        of_run=True,
    ),
    Column(
        "prompt_tokens_mean",
        "number",
        "of a server: prompt tokens per sample as it counts them (`usage`), which need not be those it keeps",
        low=0,
        late=True,
        of_run=True,
    ),
    Column("new_tokens_mean", "number", "generated tokens per sample", low=0, of_run=True),
    Column("prompt_sha256", "sha256", "hash of the set of prompt templates", of_run=True),
    Column("min_pixels", "integer", "lower pixel limit of an image; empty: the processor's own", low=0, of_run=True),
    Column("max_pixels", "integer", "upper pixel limit of an image; empty: the processor's own", low=0, of_run=True),
    Column("max_new_tokens", "integer", "generation limit", low=1, of_run=True),
    Column("generation", "json", "every generation parameter in force; empty: not noted", late=True, of_run=True),
    Column("video", "text", "how video files become frames, and who decodes; empty: pictures", late=True, of_run=True),
    Column("judge", "text", "`name@snapshot`, `exact_matching`, or `none` where nothing is judged"),
    Column("judge_failures", "integer", "answers that the judge could not rate", low=0, of_run=True),
    Column("ivcp_commit", "text", "commit of ivcp-eval; version and code hash of an installed package", of_run=True),
    Column("ivcp_dirty", "boolean", "the working tree had uncommitted changes", of_run=True),
    Column("torch_version", "text", "PyTorch", of_run=True),
    Column("transformers_version", "text", "transformers", of_run=True),
    Column("vlmeval_version", "text", "VLMEvalKit (distribution and version, or commit)", of_run=True),
    Column("dtype", "text", "weights and activations, e.g. `bfloat16`", of_run=True),
    Column(
        "quantised",
        "text",
        "how the weights of linear layers are stored, `int8` or `int4`, and by which library; empty: as they are",
        late=True,
        of_run=True,
    ),
    Column("device", "text", "accelerator name, or `cpu`", of_run=True),
    Column("attention", "text", "attention kernel: `sdpa`, `eager`, `flash_attention_2`", of_run=True),
    Column("trained_weights", "boolean", "false: random weights, whose accuracies mean nothing", of_run=True),
    Column("run_id", "text", "hash of everything that can change the row; empty for published numbers"),
    Column("predictions", "text", "per-sample CSV, relative to this file's folder; empty: totals only"),
    Column(
        "source", "text", "citation of a published number, and how far to trust it; empty for own runs", of_run=True
    ),
    Column("date", "date", "when the row was made or published", of_run=True),
)

_ANSWERED = {
    said.column: Column(said.column, said.kind, said.description, low=said.low)  # type: ignore[arg-type]
    for said in measured().values()
    if said.column
}

SAMPLE_COLUMNS: tuple[Column, ...] = (
    Column("index", "text", "the benchmark's own index of the sample", required=True),
    Column("cluster", "text", "samples of one cluster are not independent (same image, same question group)"),
    Column("category", "text", "the benchmark's category"),
    Column("prompt_sha256", "sha256", "hash of the text and images of the question, before any resizing"),
    _ANSWERED["prediction"],
    Column("answer", "text", "the true answer"),
    Column("score", "number", "score of this sample in [0, 1]; empty if it cannot be scored alone", low=0, high=1),
    Column(
        "iou",
        "number",
        "grounding: overlap of the box with the true one, or, where agreement is measured, with the unpruned model's",
        low=0,
        high=1,
        late=True,
    ),
    Column(
        "similarity",
        "number",
        "where agreement is measured: likeness of the answer's text to the unpruned model's, 1 if equal",
        low=0,
        high=1,
        late=True,
    ),
    Column(
        "box", "text", "grounding: the box that is scored, as fractions of the picture, or why there is none", late=True
    ),
    _ANSWERED["visual_tokens"],
    _ANSWERED["visual_kept"],
    replace(
        _ANSWERED["seconds_per_step"],
        description="seconds from one grid step of its first video to the next, mean, as the model was shown them "
        "(`second_per_grid_ts` of Qwen2.5-VL); empty: no video, one step, or times that nothing says",
        late=True,
    ),
    Column("layer_mean_ratio", "number", "share of them alive, mean over layers of the prefill", low=0, high=1),
    Column("kv_ratio", "number", "share of them in the KV cache, mean over layers", low=0, high=1),
    Column(
        "flops_ratio", "number", "decoder FLOPs of its prefill over those without pruning", low=0, high=1, late=True
    ),
    Column("prefill_ms", "number", "milliseconds, where the sample is one of those that were timed", low=0),
    Column("decode_ms", "number", "milliseconds per generated token after the first, likewise", low=0),
    replace(_ANSWERED["prompt_tokens"], late=True),
    _ANSWERED["new_tokens"],
    _ANSWERED["error"],
    replace(
        _ANSWERED["masks"],
        description="which visual tokens each cut kept, and where they lie in the picture "
        "(`ivcp_eval.interface.records.masks.Masks.from_text`); empty where no cut removed any",
        late=True,
    ),
)

_RUN_ID = next(column for column in COLUMNS if column.name == "run_id")
#: Columns of ``<name>.csv``: what was measured; and of ``<name>.runs.csv``: how, one line per run.
ROW_COLUMNS: tuple[Column, ...] = tuple(column for column in COLUMNS if not column.of_run)
RUN_COLUMNS: tuple[Column, ...] = (_RUN_ID, *(column for column in COLUMNS if column.of_run))
COLUMN_NAMES: tuple[str, ...] = tuple(column.name for column in COLUMNS)
SAMPLE_COLUMN_NAMES: tuple[str, ...] = tuple(column.name for column in SAMPLE_COLUMNS)


def _table(columns: Sequence[Column]) -> list[str]:
    rows = [f"| `{column.name}` | {column.allowed} | {column.description} |" for column in columns]
    return ["| column | cell | meaning |", "| --- | --- | --- |", *rows]


def schema_markdown() -> str:
    """The schemas as Markdown tables: the generated part of `results/README.md`."""
    shown = (
        "Text cells that a spreadsheet would run as a formula (`=`, `+`, `-`, `@` in front, numbers aside) have an "
        "apostrophe in front; control characters stand as `\u241b` and two hexadecimal digits, `\u241b` itself twice. "
        "`ivcp_eval.reports.table` reads them back as they were."
    )
    parts = (
        ("Results CSV: `<name>.csv`", ROW_COLUMNS),
        ("Runs CSV: `<name>.runs.csv`", RUN_COLUMNS),
        ("Per-sample CSV", SAMPLE_COLUMNS),
    )
    lines = [line for title, columns in parts for line in (f"## {title}", "", *_table(columns), "")]
    return "\n".join([shown, "", *lines])
