"""Of a thinking model's answer only what follows ``</think>`` is scored, as VLMEvalKit splits it for every data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks.thinking import split_thinking
from ivcp_eval.interface.registry import adapter
from ivcp_eval.runs.answering.boxes import scored_box
from tests.vlmeval_bridge.conftest import Laboratory, judge_for
from tests.vlmeval_bridge.files import SHORT, Files, files
from tests.vlmeval_bridge.miniatures import miniatures
from tests.vlmeval_bridge.test_matrix import NAMES

__all__ = ["files"]


@pytest.mark.parametrize("name", NAMES)
def test_thoughts_cost_nothing_on_any_benchmark(laboratory: Laboratory, tmp_path: Path, name: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    miniature, dataset = miniatures()[name], laboratory.dataset(name)
    thought = {i: f"<think>Yes, no, A, B, [1, 2, 3, 4]: {miniature.wrong[i]}?</think>\n\n{miniature.right[i]}"
               for i in miniature.right}  # fmt: skip
    predictions = bridge.stored(dataset, thought, tmp_path)
    scored = bridge.score(benchmarks.load(name), dataset, predictions, judge_for(miniature))
    expected = {metric: values[0] for metric, values in miniature.scores.items()}
    assert {metric: score for metric, (score, _) in scored.metrics.items()} == pytest.approx(expected, abs=1e-6)
    assert scored.thinking == len(dataset.data)
    assert f"of {scored.thinking} answers only what follows </think> was scored" in scored.remark


def test_sets_of_ones_own_too_unless_they_say_otherwise(files: Files):
    rows = [{"index": i, "question": f"q{i}", "answer": "2"} for i in range(3)]
    answers = {"0": "<think>3</think>2", "1": "2", "2": "<think>It is 2"}
    scored = files.score(files.put("own", rows, SHORT), answers)
    assert (list(scored.samples.values()), scored.thinking) == ([1, 1, 0], 1)
    kept = files.score(files.put("tagged", rows, f"{SHORT}thinking: kept\n"), answers)
    assert (list(kept.samples.values()), kept.thinking) == ([0, 1, 0], 0)
    with pytest.raises(ValueError, match=r"thinking 'cut'; allowed: split, kept"):
        files.put("wrong", rows, f"{SHORT}thinking: cut\n")
    assert benchmarks.undeclared("TreeBench").thinking == "kept", "its evaluator reads the boxes between the tags"


@pytest.mark.parametrize(
    ("text", "answer", "thinking"),
    [
        ("<think>\nhm\n</think>\n\nB", "B", "hm"),
        ("hm</think>B", "B", "hm"),
        ("<think>a</think>b</think> B", "B", "a</think>b"),
        ("<think></think>B", "B", ""),
        ("<think>cut off", "<think>cut off", ""),
        (" B ", " B ", ""),
    ],
)
def test_where_thinking_ends(text: str, answer: str, thinking: str):
    assert split_thinking(text) == (answer, thinking)


def test_a_box_that_was_thought_of_is_not_the_answer():
    text = "<think><box>[[0, 0, 10, 10]]</box>?</think><box>[[100, 200, 300, 400]]</box>"
    assert scored_box(text, adapter("internvl"), None) == "[0.100000, 0.200000, 0.300000, 0.400000]"
