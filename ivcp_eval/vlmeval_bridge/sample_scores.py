"""Per-sample scores where VLMEvalKit's evaluators leave none, by VLMEvalKit's own functions on its own files.

A rule takes the data set object, the evaluated prediction file and the name under which the evaluator wrote, and
returns index -> score in 0..1. Their mean (or, for circular sets, the share of questions whose rotations are all
right) is the reported score; tests/vlmeval_bridge hold every rule to that.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlmeval.dataset.utils.mathvista import post_check
from vlmeval.dataset.utils.multiple_choice import prefetch_answer
from vlmeval.dataset.utils.vqa_eval import hit_calculate
from vlmeval.smp import load

from ivcp_eval.vlmeval_bridge.reading import answers
from ivcp_eval.vlmeval_bridge.scores import read_table

Rule = Callable[[Any, Path, str], dict[str, float]]
_FORMULAS = "Handwritten Mathematical Expression Recognition"


def circular(dataset: Any, predictions: Path, evaluator: str) -> dict[str, float]:
    """Each rotation on its own; the evaluator keeps one verdict per question."""
    truth = {str(index): answer for index, answer in zip(dataset.data["index"], dataset.data["answer"], strict=True)}
    rows = answers.read(predictions).to_dict("records")
    read = {str(row["index"]): prefetch_answer({**row, "prediction": str(row["prediction"])}) for row in rows}
    return {index: float(option == truth[index]) for index, option in read.items()}


def vqa(dataset: Any, predictions: Path, evaluator: str) -> dict[str, float]:
    """VQA accuracy, relaxed accuracy, ANLS or exact match, as the evaluator aggregates its matches."""
    table = read_table(predictions.parent, predictions.stem, "_results.tsv")
    scores = hit_calculate([{"match": ast.literal_eval(cell)} for cell in table["eval_match"]], dataset.dataset_name)
    return {str(index): float(score) for index, score in zip(table["index"], scores, strict=True)}


def ocrbench(dataset: Any, predictions: Path, evaluator: str) -> dict[str, float]:
    """1 where the answer contains a true answer: case and line breaks aside, in formulas also spaces, but not case."""
    scores = {}
    for row in answers.read(predictions).to_dict("records"):
        fold = _formula if row["category"] == _FORMULAS else _text
        answer = fold(str(row["prediction"]))
        scores[str(row["index"])] = float(any(fold(truth) in answer for truth in ast.literal_eval(row["answer"])))
    return scores


def _text(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def mathvista(dataset: Any, predictions: Path, evaluator: str) -> dict[str, float]:
    """Whether the extracted answer is the true one."""
    ending = f"_{evaluator}.tsv"
    indices = read_table(predictions.parent, predictions.stem, ending)["index"]
    # The other columns as the evaluator reads them, so that the two agree.
    rows = load(str(predictions.with_name(f"{predictions.stem}{ending}"))).to_dict("records")
    return {index: float(bool(post_check(row, prefetch=False))) for index, row in zip(indices, rows, strict=True)}


RULES: Mapping[str, Rule] = {"circular": circular, "vqa": vqa, "ocrbench": ocrbench, "mathvista": mathvista}
