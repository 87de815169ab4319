"""What a cell measured: the content of its ``run.json`` and of its per-sample CSV, from its answers and scores alone.

Everything here is a pure function of the journal and ``scores.json``, so a correction here or in `engine.cost` shows
in the results after ``ivcp sweep results``, without answering or scoring anything again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.engine.cost.measured import Shares, measured
from ivcp_eval.interface import records
from ivcp_eval.interface.failures import misses
from ivcp_eval.interface.records import Answer
from ivcp_eval.reports.schema import SAMPLE_COLUMN_NAMES
from ivcp_eval.runs.answering.timing import Times
from ivcp_eval.runs.records.scores import Sample, Scores, unread

Answers = Mapping[str, Answer]
"""Of a journal by key."""
_ANSWERED = {name: meaning.column for name, meaning in records.measured().items() if meaning.column}
_UNANSWERED = Answer(error="no answer was made")


@dataclass(frozen=True)
class CellRecord:
    """What a cell measured.

    Attributes:
        status: "ok", "incomplete" (scored, but not all of it), "failed", or "skipped" (the model cannot run it).
        reason: in words if the status is not "ok", else a remark.
        identity: of the cell. metrics: name -> {"score", "scale"}.
        together: an answer was made together with others in half precision (`Cell.exact`).
        visual_tokens_prompt_mean, new_tokens_mean: per sample. prompt_tokens_mean: likewise, as a server counts them.
        requests_per_s: of a server, with as many requests under way as `variants.Server.concurrency` says.
        ratio_*: shares of the unpruned model, weighted by visual tokens, so that big images weigh as they cost.
        *_median: milliseconds per sample, or per token.
        samples_sha256: of the rows of the per-sample CSV. predictions_sha256: of that file, which is made again where
            it is damaged or out of date.
        n_thinking: answers of which only what follows ``</think>`` was scored (`benchmarks.Benchmark.thinking`).
    """

    status: str
    reason: str
    identity: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]
    faithfulness: str
    judge_failures: int | None
    n_samples: int
    n_clusters: int
    n_failed: int
    together: bool
    visual_tokens_prompt_mean: float | None
    ratio_kept_final: float | None
    ratio_layer_mean: float | None
    ratio_flops: float | None
    ratio_kv_cache: float | None
    new_tokens_mean: float | None
    prefill_ms_median: float | None
    decode_ms_per_token_median: float | None
    vision_ms_median: float | None
    ivcp_commit: str
    ivcp_dirty: bool | None
    device: str
    date: str
    timeout_s: float | None
    samples_sha256: str
    predictions_sha256: str = ""
    n_thinking: int = 0
    ratio_kv_analytic: float | None = None
    ratio_flops_analytic: float | None = None
    prompt_tokens_mean: float | None = None
    first_token_ms_median: float | None = None
    requests_per_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As ``run.json`` holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> CellRecord:
        """Back from `to_json`, through JSON."""
        return cls(**fields)


def cell_record(
    identity: Mapping[str, Any],
    answers: Answers,
    scores: Scores,
    decoder: Mapping[str, Any] | None = None,
    times: Mapping[str, Times] = MappingProxyType({}),
    requests_per_s: float | None = None,
) -> CellRecord:
    """The record of a cell.

    Args:
        identity: as JSON. answers: the journal's records. decoder: sizes by which FLOPs are counted (`Cell.note`).
        times: of the samples that were timed, by index. requests_per_s: of a server, where it was measured.
    """
    rows, shape = sample_rows(answers, scores, decoder, times), _shape(decoder)
    good = [row for row in rows if not row["error"]]
    used = [answers[sample.key] for sample, row in zip(scores.samples, rows, strict=True) if not row["error"]]
    failed, refused = misses(rows, answers)
    problem = scores.problem or failed
    status = "ok" if not problem else ("incomplete" if scores.metrics else "failed")
    remarks = [
        scores.remark,
        refused,
        _counted([answer.over_budget for answer in used], "samples have pictures that cost more at any size"),
        _counted([answer.nonfinite_scores > 0 for answer in used], "samples had scores that are not finite"),
    ]
    counted = [row for row in good if row["visual_tokens"] is not None]  # a server does not say
    visual = sum(row["visual_tokens"] for row in counted)

    def share(column: str) -> float | None:
        """Mean over visual tokens; where there are none, nothing was saved or spent."""
        values = [row[column] * row["visual_tokens"] for row in counted if row[column] is not None]
        return sum(values) / visual if values else None

    return CellRecord(
        status="skipped" if scores.unsupported else status,
        reason=problem or "; ".join(filter(None, remarks)),
        identity=dict(identity),
        metrics={name: {"score": score, "scale": scale} for name, (score, scale) in scores.metrics.items()},
        faithfulness=scores.made.faithfulness,
        judge_failures=scores.judge_failures,
        n_samples=len(rows),
        n_clusters=len({row["cluster"] for row in rows}),
        n_failed=len(rows) - len(good),
        together=any(answer.together for answer in used),
        visual_tokens_prompt_mean=visual / len(counted) if counted else None,
        ratio_kept_final=sum(row["visual_kept"] for row in counted) / visual if visual else None,
        ratio_layer_mean=share("layer_mean_ratio"),
        ratio_flops=share("flops_ratio"),
        ratio_kv_cache=share("kv_ratio"),
        new_tokens_mean=statistics.fmean(row["new_tokens"] for row in good) if good else None,
        prefill_ms_median=_median(times, "prefill_ms"),
        decode_ms_per_token_median=_median(times, "decode_ms_per_token"),
        vision_ms_median=_median(times, "vision_ms"),
        ivcp_commit=scores.made.commit,
        ivcp_dirty=scores.made.dirty,
        device=_devices(identity, used),
        date=scores.made.date,
        timeout_s=scores.made.timeout_s,
        samples_sha256=_digest(rows),
        n_thinking=scores.thinking,
        ratio_kv_analytic=_weighted([(a.kv_analytic, a.visual_tokens or 0) for a in used]),
        ratio_flops_analytic=_weighted([(_shares(a, shape).flops_analytic, a.visual_tokens or 0) for a in used]),
        prompt_tokens_mean=_mean([row["prompt_tokens"] for row in good if row["prompt_tokens"] is not None]),
        first_token_ms_median=_median(times, "first_token_ms"),
        requests_per_s=requests_per_s,
    )


def sample_rows(
    answers: Answers,
    scores: Scores,
    decoder: Mapping[str, Any] | None = None,
    times: Mapping[str, Times] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """The rows of the per-sample CSV (`reports.schema`), one for each of the benchmark's, in its order."""
    shape = _shape(decoder)
    return [_sample_row(s, answers.get(s.key, _UNANSWERED), shape, times.get(s.index)) for s in scores.samples]


def _sample_row(sample: Sample, answer: Answer, shape: DecoderShape | None, times: Times | None) -> dict[str, Any]:
    cost = _shares(answer, shape)
    return {
        "index": sample.index,
        "cluster": sample.cluster,
        "category": sample.category,
        "prompt_sha256": "" if sample.key == unread(sample.index) else sample.key,
        "answer": sample.answer,
        "score": sample.score,
        "iou": sample.iou,
        "similarity": sample.similarity,
        "box": answer.box or "",
        "layer_mean_ratio": cost.layer_mean,
        "kv_ratio": cost.cached,
        "flops_ratio": cost.flops,
        "prefill_ms": times.prefill_ms if times else None,
        "decode_ms": times.decode_ms_per_token if times else None,
        **{column: getattr(answer, name) for name, column in _ANSWERED.items()},
    }


def _shape(decoder: Mapping[str, Any] | None) -> DecoderShape | None:
    return None if decoder is None else DecoderShape(**{**decoder, "mlps": tuple(decoder["mlps"])})


def _shares(answer: Answer, shape: DecoderShape | None) -> Shares:
    if answer.error or answer.visual_tokens is None or answer.text_tokens is None:
        return Shares()
    counts = answer.visual_per_layer, answer.visual_cached, shape, answer.visual_pairs, answer.visual_mlp
    return measured(answer.visual_tokens, answer.text_tokens, *counts)


def _weighted(shares: Sequence[tuple[float | None, int]]) -> float | None:
    """Mean of shares over the visual tokens of the answers that say one."""
    said = [(share, tokens) for share, tokens in shares if share is not None]
    visual = sum(tokens for _, tokens in said)
    return sum(share * tokens for share, tokens in said) / visual if visual else None


def _counted(hits: Sequence[bool], what: str) -> str:
    return f"{sum(hits)} of {len(hits)} {what}" if any(hits) else ""


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([SAMPLE_COLUMN_NAMES, rows]).encode()).hexdigest()


def _median(times: Mapping[str, Times], name: str) -> float | None:
    values = [value for timed in times.values() if (value := getattr(timed, name)) is not None]
    return statistics.median(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _devices(identity: Mapping[str, Any], used: Sequence[Answer]) -> str:
    """What answered, by the answers themselves: who scores may have no GPU, and several kinds may share a cell."""
    names = sorted({answer.device for answer in used if answer.device})
    return " + ".join(names) or ("cpu" if identity["placement"]["device"] == "cpu" else "")
