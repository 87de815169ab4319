"""Agreement with the unpruned model: worked by hand."""

from __future__ import annotations

import pytest

from ivcp_eval.benchmarks.agreement import agreement


def test_texts() -> None:
    found = agreement({"1": "a cat ", "2": "abcd"}, {"1": "a cat", "2": "bcde", "3": ""}, boxes=False)
    assert found.samples == {"1": 1, "2": 0, "3": 0}, "an answer that failed agrees with nothing, also not with none"
    # difflib: 2 * matching characters / all characters = 2 * 3 / 8; row 3: two empty texts, one of which failed.
    assert found.similarities == {"1": 1, "2": 0.75, "3": 0}
    assert found.metrics == {"agreement": pytest.approx(100 / 3), "agreement_text_similarity": pytest.approx(175 / 3)}


def test_another_case_is_another_answer() -> None:
    found = agreement({"1": "Red"}, {"1": "red"}, boxes=False)
    assert found.samples == {"1": 0}
    assert found.similarities["1"] == pytest.approx(2 / 3)


def test_boxes() -> None:
    before = {"1": "[0, 0, 0.5, 1]", "2": "[0, 0, 0.5, 1]", "3": "none", "4": "none", "5": "[0.5, 0.5, 0.5, 0.5]"}
    now = {"1": "[0, 0, 1, 1]", "2": "[0.5, 0, 1, 1]", "3": "none", "4": "nothing", "5": "[0.5, 0.5, 0.5, 0.5]"}
    found = agreement(now, before, boxes=True)
    assert found.ious == {"1": pytest.approx(0.5), "2": 0, "3": 1, "4": 0, "5": 1}
    assert [value == 1 for value in found.similarities.values()] == [False, False, True, False, True]
    assert found.metrics == pytest.approx(
        {"agreement_iou@0.5": 60.0, "agreement_mean_iou": 50.0, "agreement_exact": 40.0}
    )
    assert set(agreement(before, before, boxes=True).metrics.values()) == {100.0}
