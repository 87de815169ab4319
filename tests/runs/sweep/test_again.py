"""``controls: [again]``: the baseline is answered a second time, never copied, and tables show what differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import ivcp_eval
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.marked import SpecError
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.table import read_results
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Placement
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import load
from tests.runs.conftest import Bench


def test_a_second_answering_is_the_noise_floor(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, asked = Session.answer, []

    def noisy(self: Session, parts: Any, variant: Any, *more: Any) -> Any:
        """One of the second answers comes out otherwise, as batching in half precision makes it."""
        asked.append(variant.method)
        made = answer(self, parts, variant, *more)
        return replace(made, prediction="noise") if variant.method == "again" and len(asked) == 1 else made

    monkeypatch.setattr(Session, "answer", noisy)
    text = bench.spec.read_text().replace("controls: []", "controls: [again]").replace("batch: 1", "batch: 2")
    bench.spec.write_text(text.replace("  - {method: downsample, ratios: [0.5]}\n", ""))
    assert bench.call("run", "--quiet") == 0
    assert asked == ["again"] * 10, "each sample of both benchmarks in a pass of its own"
    rows = read_results(bench.csv)
    again = [row for row in rows if row["method"] == "again"]
    assert {row["benchmark"] for row in again} == {"tiny_mcq", "tiny_yes_no"}
    assert all(row["ratio_asked"] == row["ratio_kept_final"] == 1 and row["status"] == "ok" for row in again)
    assert len({row["run_id"] for row in rows}) == len({row["predictions"] for row in rows}) == 2 * 5
    comparison = compare(bench.csv, resamples=50)
    changed = {row.benchmark: row.answers_changed for row in comparison.rows if row.method == "again"}
    assert sorted(changed.values()) == [0, 1]
    for row in comparison.rows:
        floors = [(again.settings, again.answers_changed) for again in row.again]
        assert floors == ([] if row.method == "again" else [("", changed[row.benchmark])])
        assert (row.method == "again") == (row.p_holm != row.p_holm), "no hypothesis about a method"
    assert "A/A: difference of the unpruned model's second answers" in comparison.to_terminal(999)


ELSEWHERE = "[again, {method: again, parameters: {attention: eager}}, {method: again, parameters: {dtype: bfloat16}}]"


def elsewhere(bench: Bench, controls: str = ELSEWHERE) -> None:
    text = bench.spec.read_text().replace("controls: []", f"controls: {controls}")
    text = text.replace("  - {method: fastv, ratios: [0.5]}\n  - {method: downsample, ratios: [0.5]}\n", "")
    bench.spec.write_text(text.replace("timing: false", "timing: 1"))


def test_the_baseline_in_another_kernel_and_in_another_dtype(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(bench)
    loaded, answered, load_model, answer = [], [], Session.__init__, Session.answer

    def noted(self: Session, weights: Any, placement: Placement, *more: Any) -> None:
        loaded.append((placement.dtype, placement.attention))
        load_model(self, weights, placement, *more)

    def noisy(self: Session, parts: Any, variant: Any, *more: Any) -> Any:
        """Really answered by the model that was loaded so; two of the answers in bfloat16 come out otherwise."""
        text_model = self.adapter.text_model(self.model)
        answered.append((dict(variant.parameters), text_model.dtype, text_model.config._attn_implementation))
        made = answer(self, parts, variant, *more)
        half = [parameters for parameters, *_ in answered if "dtype" in parameters]
        return replace(made, prediction="noise") if "dtype" in variant.parameters and len(half) <= 2 else made

    monkeypatch.setattr(Session, "__init__", noted)
    monkeypatch.setattr(Session, "answer", noisy)
    assert bench.call("run", "--quiet") == 0
    usual = ("float32", "sdpa")
    assert loaded == [usual, ("float32", "eager"), ("bfloat16", "sdpa"), usual], "once for each, and to measure times"
    assert [entry for entry in answered if entry[0]] == [
        *[({"attention": "eager"}, torch.float32, "eager")] * 10,
        *[({"dtype": "bfloat16"}, torch.bfloat16, "sdpa")] * 10,
    ]
    rows = [row for row in read_results(bench.csv) if row["method"] == "again"]
    assert [(row["dtype"], row["attention"], row["status"]) for row in rows] == [
        (*usual, "ok"),
        ("float32", "eager", "ok"),
        ("bfloat16", "sdpa", "ok"),
    ] * 2
    assert len({row["run_id"] for row in rows}) == 6
    comparison = compare(bench.csv, resamples=50)
    names = ["", "attention=eager", "dtype=bfloat16"]
    floors = {row.settings: row for row in comparison.rows if row.method == "again" and row.benchmark == "tiny_mcq"}
    assert list(floors) == names
    assert floors["dtype=bfloat16"].answers_changed == 2 > floors["attention=eager"].answers_changed
    assert any("dtype: baseline float32, results bfloat16" in note for note in floors["dtype=bfloat16"].notes)
    pruned = [row for row in comparison.rows if row.method == "ivc_prune"]
    for row in pruned:
        assert [again.settings for again in row.again] == names
        if row.benchmark == "tiny_mcq":
            assert [again.answers_changed for again in row.again] == [floors[name].answers_changed for name in names]
            assert [again.difference for again in row.again] == [floors[name].difference for name in names]
            assert row.record()["again_answers_changed"] == max(again.answers_changed or 0 for again in row.again)
    assert "; attention=eager +" in comparison.to_terminal(999)
    timed = {row.settings if row.method == "again" else row.method: row.times["prefill"].n for row in comparison.rows}
    assert timed == {"ivc_prune": 1, "": 1, "attention=eager": 0, "dtype=bfloat16": 0}, "of one loaded model alone"
    assert bench.call("run", "--quiet") == 0
    assert len(loaded) == 4, "everything is done"


def test_other_work_goes_on_where_a_kernel_is_missing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere(bench, "[{method: again, parameters: {attention: flash_attention_3}}]")
    assert bench.call("run") == 1
    printed = capsys.readouterr().out
    assert "tiny (flash_attention_3) could not be loaded, so nothing of it is answered" in printed
    assert "2 cells of small have no record yet" in printed
    assert {row["method"] for row in read_results(bench.csv)} == {"none", "ivc_prune"}


@pytest.mark.parametrize(
    ("controls", "said"),
    [
        ("[{method: again, parameters: {dtype: int8}}]", r"line 8: dtype='int8' .*float32, bfloat16, float16; leave"),
        ("[{method: again, parameters: {attention: [eager, fast]}}]", r"line 8: attention='fast' .*sdpa, eager, flash"),
        ("[{method: again, parameters: {kernel: eager}}]", r"line 8: .*no parameter 'kernel'.*attention, dtype"),
        ("[{method: again, dtype: bfloat16}]", r"line 8: unknown key 'dtype'.*Allowed: method, parameters"),
        ("[{parameters: {dtype: bfloat16}}]", r"line 8: unknown control 'None'.*again"),
    ],
)
def test_a_wrong_name_is_refused_in_words(bench: Bench, controls: str, said: str) -> None:
    bench.spec.write_text(bench.spec.read_text().replace("controls: []", f"controls: {controls}"))
    with pytest.raises(SpecError, match=said):
        load(bench.spec)


def test_a_loaded_model_is_not_taken_for_another(bench: Bench) -> None:
    elsewhere(bench)
    plan = make(load(bench.spec), bench.folder / "runs")
    model = plan.models["tiny"]
    session = Session(model.weights, model.placement, model.limits)
    _, cells = model.groups["tiny_mcq"]
    refused = [cell for cell in cells if cell.identity.variant.parameters.keys() & {"dtype", "attention"}]
    assert len(refused) == 2
    for cell in refused:
        with pytest.raises(Unsupported, match=r"needs a model that is loaded so; this one has (float32|sdpa)"):
            session.check(cell.identity.variant)
    with (
        pytest.raises(Unsupported, match="'again' with dtype=bfloat16"),
        ivcp_eval.prune(session.model, "again", 1.0, dtype="bfloat16"),
    ):
        pass
