"""A cell's record is a function of its identity, answers and scores."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.interface.records import Answer
from ivcp_eval.runs.answering.timing import Times
from ivcp_eval.runs.records.record import CellRecord, cell_record, sample_rows
from ivcp_eval.runs.records.scores import Made, Sample, Scores, unread

IDENTITY = {"placement": {"device": "cpu"}}
SHAPE = asdict(DecoderShape(2, 8, 2, 2, 4, 16))


def answer(visual: int, *per_layer: int, **more: Any) -> Answer:
    counts = {"visual_tokens": visual, "visual_kept": per_layer[-1], "text_tokens": 3, "new_tokens": 2}
    return Answer(prediction="A", visual_per_layer=per_layer, visual_cached=per_layer, **counts, **more)


ANSWERS = {
    "a": answer(10, 10, 5),
    "b": answer(30, 30, 30, over_budget=True),
    "row 2": Answer(error="OSError: no picture"),
}
SCORES = Scores(
    Made("c0ffee", False, "faithful", timing=False),
    {"accuracy": (50.0, 100.0)},
    (Sample("0", "a", "x", score=1.0), Sample("1", "b", "x", score=0.0), Sample("2", unread("2"), "y")),
)


def test_shares_weigh_as_pictures_cost() -> None:
    record = cell_record(IDENTITY, ANSWERS, SCORES, SHAPE)
    assert record.ratio_layer_mean == record.ratio_kv_cache == pytest.approx((0.75 * 10 + 30) / 40)
    assert record.ratio_kept_final == 35 / 40
    assert record.visual_tokens_prompt_mean == 20
    assert 0.75 < (record.ratio_flops or 0) < 1
    assert cell_record(IDENTITY, ANSWERS, SCORES).ratio_flops is None, "nobody noted the decoder's sizes"


def test_analytic_savings_are_kept_apart() -> None:
    answers = {"a": answer(10, 10, 10, kv_analytic=0.5), "b": answer(30, 30, 30, kv_analytic=0.1), "c": answer(9, 9)}
    samples = tuple(Sample(str(i), key, "x", score=1.0) for i, key in enumerate("abc"))
    record = cell_record(IDENTITY, answers, replace(SCORES, samples=samples))
    assert record.ratio_kv_cache == 1
    assert record.ratio_kv_analytic == pytest.approx((0.5 * 10 + 0.1 * 30) / 40), "one-token answers read nothing"
    assert cell_record(IDENTITY, ANSWERS, SCORES, SHAPE).ratio_kv_analytic is None


def test_failures_are_counted_and_named() -> None:
    record = cell_record(IDENTITY, ANSWERS, SCORES, SHAPE)
    assert (record.status, record.n_samples, record.n_clusters, record.n_failed) == ("incomplete", 3, 2, 1)
    assert record.reason == "1 of 3 samples failed (OSError 1), e.g. 2: OSError: no picture"
    whole = replace(SCORES, samples=SCORES.samples[:2])
    record = cell_record(IDENTITY, ANSWERS, whole, SHAPE)
    assert (record.status, record.reason) == ("ok", "1 of 2 samples have pictures that cost more at any size")
    lost = cell_record(IDENTITY, {"a": ANSWERS["a"]}, whole, SHAPE)
    assert (lost.status, lost.n_failed) == ("incomplete", 1), "an answer that is not there is a failure, not a gap"
    unsupported = replace(Scores(SCORES.made), problem="it cannot", unsupported=True)
    assert cell_record(IDENTITY, {}, unsupported).status == "skipped"
    assert cell_record(IDENTITY, {}, replace(unsupported, unsupported=False)).status == "failed"


def test_times_of_timed_samples_are_medians_and_cells() -> None:
    times = {"0": Times(None, 3.0, 1.0, 9.0), "1": Times(None, 5.0, None, 9.0)}
    record = cell_record(IDENTITY, ANSWERS, SCORES, SHAPE, times)
    assert (record.prefill_ms_median, record.decode_ms_per_token_median, record.vision_ms_median) == (4, 1, None)
    assert [row["prefill_ms"] for row in sample_rows(ANSWERS, SCORES, SHAPE, times)] == [3, 5, None]
    assert cell_record(IDENTITY, ANSWERS, SCORES, SHAPE).prefill_ms_median is None


def test_scores_and_records_come_back_from_their_files(tmp_path: Path) -> None:
    SCORES.write(tmp_path / "scores.json")
    assert Scores.read(tmp_path / "scores.json") == SCORES
    record = cell_record(IDENTITY, ANSWERS, SCORES, SHAPE)
    assert CellRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    nan = replace(SCORES, samples=(Sample("0", "a", score=float("nan")),))
    nan.write(tmp_path / "scores.json")
    assert Scores.read(tmp_path / "scores.json").samples[0].score is None
    (tmp_path / "scores.json").write_text('{"made": {"by": "me"}, "metrics": {}, "samples": []}')
    with pytest.raises(ValueError, match="the answers are kept"):
        Scores.read(tmp_path / "scores.json")
