"""Text stays text from the file to the score: empty answers, words that pandas takes for nothing, numbers, indices."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivcp_eval import benchmarks
from tests.vlmeval_bridge.conftest import Laboratory, ListJudge, RecordingSession, judge_for
from tests.vlmeval_bridge.files import GROUNDING, MCQ, SHORT, YES_NO, Files, files
from tests.vlmeval_bridge.miniatures import miniatures
from tests.vlmeval_bridge.test_matrix import NAMES

__all__ = ["files"]
WORDS = ("None", "NA", "null", "N/A", "nan")
OPTIONS = {"A": "US", "C": "EU", "D": "AS"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", ["", " ", "failed"])
def test_no_answer_scores_nothing(laboratory: Laboratory, tmp_path: Path, name: str, answer: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    dataset = laboratory.dataset(name)
    indices = [str(index) for index in dataset.data["index"]]
    if answer == "failed":
        predictions = bridge.infer(dataset, laboratory.model(RecordingSession()), tmp_path / "work", indices)
    else:
        predictions = bridge.stored(dataset, dict.fromkeys(indices, answer), tmp_path)
    # The most generous judge there is: it is not to be asked.
    judge = ListJudge(lambda _: "8 10" if name == "LLaVABench" else "1.0") if judge_for(miniatures()[name]) else None
    scored = bridge.score(benchmarks.load(name), dataset, predictions, judge)
    assert {metric: score for metric, (score, _) in scored.metrics.items()} == dict.fromkeys(
        miniatures()[name].scores, 0
    )
    assert set(scored.samples.values()) <= {0.0}


# What "nan", an empty text, or a text without its article is right about.
TRAPS = {
    "AI2D_TEST": [{"A": "H", "B": "A", "C": "F", "D": "K", "answer": "B"}, {"A": "N", "B": "E", "answer": "A"}],
    "MMStar": [{"A": "nan", "B": "x", "answer": "A", "category": "c"}],
    "DocVQA_VAL": [{"answer": "['n/a']"}, {"answer": "['nan']"}],
    "GQA_TestDev_Balanced": [{"answer": "nan"}, {"answer": "n/a"}],
    "TextVQA_VAL": [{"answer": str(["a"] * 10)}, {"answer": str(["nan"] * 10)}],
    "ChartQA_TEST": [{"answer": "nan", "split": "test_human"}, {"answer": "n", "split": "test_augmented"}],
    "OCRBench": [{"answer": f"['{text}']", "category": "Regular Text Recognition"} for text in "na"],
}


@pytest.mark.parametrize("name", TRAPS)
def test_no_answer_is_not_a_word(files: Files, name: str):
    rows = [{"index": i, "question": f"q{i}", **row} for i, row in enumerate(TRAPS[name])]
    benchmark = files.put(name, rows)
    scored = files.score(benchmark, {str(i): "" for i in range(len(rows))})
    assert {score for score, _ in scored.metrics.values()} == {0}
    assert set(scored.samples.values()) == {0.0}


@pytest.mark.parametrize("odd", ["", "12.5", "seven"])
def test_one_odd_answer_does_not_turn_the_others(files: Files, odd: str):
    rows = [{"index": i, "question": f"How many {i}?", "answer": str(i + 2)} for i in range(7)]
    benchmark = files.put("counts", rows, SHORT)
    scored = files.score(benchmark, {str(i): str(i + 2) if i < 6 else odd for i in range(7)})
    assert scored.metrics["accuracy"][0] == pytest.approx(600 / 7)


def test_whole_numbers_of_a_stock_set_stay_whole(files: Files):
    rows = [{"index": i, "question": f"How many {i}?", "answer": str(i + 2)} for i in range(4)]
    benchmark = files.put("GQA_TestDev_Balanced", rows)
    scored = files.score(benchmark, {"0": "2", "1": "3", "2": "4", "3": "4.5"})
    assert scored.metrics["accuracy"][0] == 75


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("place", ["own", "MMStar", "SEEDBench_IMG", "undeclared"])
def test_an_option_that_pandas_takes_for_nothing(laboratory: Laboratory, files: Files, word: str, place: str):
    rows = [
        {"index": 1, "question": "Which code?", **OPTIONS, "B": word, "answer": "B", "category": "x"},
        {"index": 2, "question": "Which other?", **OPTIONS, "B": "XX", "answer": "C", "category": word},
        {"index": 3, "question": "Of two?", "A": "1.50", "B": "2", "C": "", "D": "", "answer": "A", "category": ""},
    ]
    benchmark = files.put(place, rows, MCQ if place == "own" else "")
    first, _, third = files.prompts(laboratory, benchmark)
    assert f"B. {word}" in first
    assert "A. 1.50" in third
    assert "C." not in third
    scored = files.score(benchmark, {"1": "B", "2": "C", "3": "A"})
    assert {score for score, _ in scored.metrics.values()} <= {100, 1.0}
    by_text = files.score(benchmark, {"1": f"It is {word}.", "2": "EU", "3": "1.50"})
    assert next(iter(by_text.metrics.values()))[0] in (100, 1.0)


@pytest.mark.parametrize("word", WORDS)
def test_a_true_answer_that_pandas_takes_for_nothing(files: Files, word: str):
    rows = [{"index": 0, "question": "Q", "answer": word}, {"index": 1, "question": "R", "answer": "red"}]
    for benchmark in (files.put("words", rows, SHORT), files.put("GQA_TestDev_Balanced", rows)):
        assert files.score(benchmark, {"0": word.lower(), "1": "red"}).metrics["accuracy"][0] == 100
        assert files.score(benchmark, {"0": "", "1": "red"}).metrics["accuracy"][0] == 50


@pytest.mark.parametrize(
    ("declared", "row", "answer"),
    [
        (MCQ, {"A": "x", "B": "y", "answer": "A"}, "A"),
        (SHORT, {"answer": "red"}, "red"),
        (YES_NO, {"answer": "Yes"}, "Yes"),
        (GROUNDING, {"answer": "[0, 0, 16, 12]", "width": 32, "height": 24}, "[0.0, 0.0, 0.5, 0.5]"),
    ],
)
def test_indices_and_categories_keep_their_names(files: Files, declared: str, row: dict, answer: str):
    indices = ["007", "08", "9", "1e3", "None"]
    rows = [{"index": index, "question": f"q{index}", "category": "Overall", **row} for index in indices]
    benchmark = files.put("names", rows, declared)
    scored = files.score(benchmark, {index: answer if index != "9" else "zz" for index in indices})
    assert scored.samples == {index: float(index != "9") for index in indices}
    assert next(iter(scored.metrics.values()))[0] == pytest.approx(80)


def test_only_whole_numbers_as_indices_keep_their_zeros(files: Files):
    rows = [{"index": index, "question": index, "answer": "red"} for index in ("1", "2", "+3")]
    scored = files.score(files.put("plain", rows, SHORT), dict.fromkeys(("1", "2", "+3"), "red"))
    assert set(scored.samples) == {"1", "2", "+3"}


def test_a_category_called_overall_does_not_replace_the_total(files: Files):
    rows = [
        {"index": i, "question": f"q{i}", "answer": "red", "category": c} for i, c in enumerate(("Overall", "other"))
    ]
    scored = files.score(files.put("totals", rows, SHORT), {"0": "red", "1": "blue"})
    assert scored.metrics["accuracy"][0] == 50
    rows = [{**row, "A": "red", "B": "blue", "answer": "A"} for row in rows]
    assert files.score(files.put("totals2", rows, MCQ), {"0": "A", "1": "B"}).metrics["accuracy"][0] == 50
