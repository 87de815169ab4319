"""An answer: what a journal keeps of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ivcp_eval.interface.failures import InputRefused
from ivcp_eval.interface.records import Answer, measured
from ivcp_eval.reports.schema import SAMPLE_COLUMN_NAMES

GOOD = Answer(
    prediction="yes",
    device="cpu",
    visual_tokens=100,
    visual_kept=50,
    text_tokens=7,
    visual_per_layer=(100, 50),
    visual_cached=(50, 50),
    new_tokens=2,
)


@pytest.mark.parametrize("answer", [GOOD, Answer.failed(OSError("gone")), Answer.failed(InputRefused("too thin"))])
def test_a_journal_line_gives_the_answer_back(answer: Answer) -> None:
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_ratio": 0.5}, "unknown keys of an answer: kv_ratio; known: prediction, box"),
        ({"visual_kept": None}, "lacks visual_kept"),
        ({"new_tokens": "2"}, "new_tokens of an answer is '2', which is no integer"),
        ({"together": 1}, "no boolean"),
        ({"visual_tokens": True}, "no integer"),
    ],
)
def test_what_is_no_answer_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Answer.from_json({**GOOD.to_json(), **change})


def test_a_failure_says_what_went_wrong_and_counts_as_an_empty_text() -> None:
    answer = Answer.failed(RuntimeError("kernel at 0x7f12 gave up"))
    assert answer.error == "RuntimeError: kernel gave up"
    assert "RuntimeError" in answer.traceback
    assert answer.scored == ""
    assert Answer(prediction="<box>", box="[0, 0, 1, 1]").scored == "[0, 0, 1, 1]"


def test_only_what_can_change_is_tried_again() -> None:
    assert GOOD.is_settled
    assert not Answer.failed(OSError("gone")).is_settled
    assert Answer.failed(InputRefused("too thin")).is_settled


def test_columns_that_users_hold_keep_their_names() -> None:
    assert (
        *("index", "cluster", "category", "prompt_sha256", "prediction", "answer", "score", "iou", "similarity", "box"),
        *("visual_tokens", "visual_kept", "seconds_per_step", "layer_mean_ratio", "kv_ratio", "flops_ratio"),
        *("prefill_ms", "decode_ms", "prompt_tokens", "new_tokens", "error", "masks"),
    ) == SAMPLE_COLUMN_NAMES
    assert {said.column for said in measured().values()} - {""} <= set(SAMPLE_COLUMN_NAMES)
