"""Grounding metrics: exact numbers on hand-made predictions, one bad answer is one miss."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ivcp_eval.benchmarks.boxes import FORMATS, format_answer, smart_resize
from ivcp_eval.benchmarks.grounding import GroundTruth, ground_truth, score, size_of


def _row(index: int, box: list[float], **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"index": index, "answer": json.dumps(box), "width": 200, "height": 100}
    return row | {"answer_width": 200, "answer_height": 100} | changes


def _truth(index: int, box: list[float], **changes: Any) -> GroundTruth:
    return ground_truth(_row(index, box, **changes))


def test_exact_numbers() -> None:
    whole = [0.0, 0.0, 200.0, 100.0]
    answers = [
        "[0, 0, 1, 1]",  # IoU 1
        "[0, 0, 1, 0.9]",  # 0.9, on the threshold
        "[0, 0, 1, 0.75]",
        "[0, 0, 0.5, 1]",  # 0.5, on the threshold
        "[0, 0, 0.499, 1]",
        "[0.5, 0.5, 0.2, 0.2]",  # inverted: read, but no overlap
        "no idea",
        float("nan"),
    ]
    result = score([(_truth(i, whole), answer) for i, answer in enumerate(answers)], FORMATS["unit"])
    summary = result.summary()
    assert summary["n"] == 8
    assert summary["Acc@0.5"] == 100 * 4 / 8
    assert summary["Acc@0.75"] == 100 * 3 / 8
    assert summary["Acc@0.9"] == 100 * 2 / 8
    assert summary["mean_iou"] == pytest.approx((1 + 0.9 + 0.75 + 0.5 + 0.499) / 8)
    assert summary["unparsable"] == 2
    assert [row["hit"] for row in result.rows()] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert summary["by_size"]["large"]["n"] == 8
    assert summary["by_size"]["small"] == {
        "n": 0, "Acc@0.5": None, "Acc@0.75": None, "Acc@0.9": None, "mean_iou": None, "unparsable": 0,
        "outside_image": 0,
    }  # fmt: skip


def test_sizes_are_original_pixels_with_coco_limits() -> None:
    assert size_of(_truth(0, [0, 0, 31.9, 32])) == "small"
    assert size_of(_truth(0, [0, 0, 32, 32])) == "medium"
    assert size_of(_truth(0, [0, 0, 96, 95.9])) == "medium"
    assert size_of(_truth(0, [0, 0, 96, 96])) == "large"
    # The same 32x32 object, stated in a frame twice as large: still measured in the original image.
    assert size_of(_truth(0, [0, 0, 62, 64], answer_width=400, answer_height=200)) == "small"


def test_per_size_numbers() -> None:
    pairs = [
        (_truth(0, [0, 0, 20, 20]), "[0, 0, 0.1, 0.2]"),
        (_truth(1, [0, 0, 20, 20]), "?"),
        (_truth(2, [0, 0, 50, 50]), "[0, 0, 0.25, 0.5]"),
    ]
    by_size = score(pairs, FORMATS["unit"]).summary()["by_size"]
    assert (by_size["small"]["n"], by_size["small"]["Acc@0.5"], by_size["small"]["unparsable"]) == (2, 50.0, 1)
    assert (by_size["medium"]["n"], by_size["medium"]["Acc@0.5"]) == (1, 100.0)


def test_perfect_qwen_answers_score_full_marks_in_every_frame() -> None:
    """The stock evaluator gives these 0: it reads pixels below 1000 as thousandths."""
    width, height = 640, 427
    for limits in ({}, {"min_pixels": 1280 * 28 * 28}):
        new_height, new_width = smart_resize(height, width, **limits)
        frame = (new_width, new_height)
        truth = _truth(0, [100, 50, 300, 400], width=width, height=height, answer_width=width, answer_height=height)
        answer = format_answer(truth.box, FORMATS["qwen2_5_vl"], frame)
        result = score([(truth, answer)], FORMATS["qwen2_5_vl"], lambda _, frame=frame: frame)
        assert result.summary()["Acc@0.9"] == 100.0
        resized = [truth.box[0] * new_width, truth.box[1] * new_height, truth.box[2] * new_width, 0.0]
        resized[3] = truth.box[3] * new_height
        same = _truth(0, resized, width=width, height=height, answer_width=new_width, answer_height=new_height)
        result = score([(same, answer)], FORMATS["qwen2_5_vl"], lambda t: t.answer_frame)
        assert result.summary()["Acc@0.9"] == 100.0


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl", "deepseek_vl2", "unit"])
def test_perfect_answers_in_the_relative_formats(name: str) -> None:
    truths = [_truth(i, [10 + i, 20, 110 + i, 80]) for i in range(20)]
    pairs = [(truth, format_answer(truth.box, FORMATS[name])) for truth in truths]
    summary = score(pairs, FORMATS[name]).summary()
    assert summary["Acc@0.9"] == 100.0
    assert summary["outside_image"] == 0


def test_a_wrongly_declared_format_shows() -> None:
    truths = [_truth(i, [10 + i, 20, 110 + i, 80]) for i in range(20)]
    pairs = [(truth, format_answer(truth.box, FORMATS["internvl"])) for truth in truths]
    summary = score(pairs, FORMATS["unit"]).summary()
    assert summary["Acc@0.5"] == 0.0
    assert summary["outside_image"] == 20


def test_mistakes_of_the_caller_are_errors() -> None:
    truth = _truth(0, [0, 0, 10, 10])
    with pytest.raises(ValueError, match="pass frame_of"):
        score([(truth, "")], FORMATS["qwen2_5_vl"])
    with pytest.raises(ValueError, match="no samples"):
        score([], FORMATS["unit"])
    with pytest.raises(ValueError, match="index 0 is scored twice"):
        score([(truth, ""), (truth, "")], FORMATS["unit"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "[1, 2, 3]"}, "row 5: unusable ground truth"),
        ({"answer": "1 2 3 4"}, "row 5: unusable ground truth"),
        ({"answer": float("nan")}, "row 5: unusable ground truth"),
        ({"answer": "[5, 5, 5, 9]"}, "row 5: the true box .* has no area"),
        ({"width": 0}, "row 5: image 0x100"),
        ({"answer_width": "x"}, "row 5: unusable ground truth"),
    ],
)
def test_bad_ground_truth_names_the_row(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ground_truth(_row(5, [0, 0, 1, 1]) | changes)


def test_a_missing_column_is_named() -> None:
    row = _row(5, [0, 0, 1, 1])
    del row["answer_width"]
    with pytest.raises(ValueError, match=r"row 5: no column 'answer_width'; convert"):
        ground_truth(row)


def test_numbers_may_be_text_as_in_a_tsv() -> None:
    row = {key: str(value) for key, value in _row(5, [0, 0, 20, 10]).items()}
    assert ground_truth(row).box == (0, 0, 0.1, 0.1)
