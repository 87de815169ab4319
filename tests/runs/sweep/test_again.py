"""``controls: [again]``: the baseline is answered a second time, never copied, and tables show what differs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.table import read_results
from ivcp_eval.runs.answering.session import Session
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
        assert row.again_answers_changed == (None if row.method == "again" else changed[row.benchmark])
        assert (row.method == "again") == (row.p_holm != row.p_holm), "no hypothesis about a method"
    assert "A/A: difference of the baseline's second answers" in comparison.to_terminal(999)
