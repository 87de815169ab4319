"""Which answers need a judge, in VLMEvalKit's own wording, and handing the verdicts to VLMEvalKit's own scoring.

Nothing of VLMEvalKit is patched and its judge is never built. What its matching can read is never sent. Verdicts reach
its evaluators in two ways, both of which it reads anyway:

* multiple choice and yes/no: the unreadable answers of the prediction file are replaced by the judge's option, and the
  evaluator runs with ``exact_matching``;
* rated sets (MMVet, LLaVABench, MathVista): the file in which the evaluator keeps its judge's replies is written before
  it looks for it.

An answer that the judge cannot rate is left out, together with the answers that are scored with it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from vlmeval.dataset.image_mcq import ImageMCQDataset
from vlmeval.dataset.image_vqa import LLaVABench, MathVista, MMVet
from vlmeval.dataset.image_yorn import ImageYORNDataset
from vlmeval.dataset.utils import llavabench, mathvista, mmvet, multiple_choice, yorn
from vlmeval.smp import cn_string, dump, get_intermediate_file_path
from vlmeval.smp.vlm import build_option_str
from vlmeval.utils import can_infer

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.vlmeval_bridge.judge import Judge, Question
from ivcp_eval.vlmeval_bridge.reading import answers
from ivcp_eval.vlmeval_bridge.reading.answers import is_empty
from ivcp_eval.vlmeval_bridge.scores import ScoreMissing, read_table

_LLAVA_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_LLAVA_TOKENS = 2048  # VLMEvalKit's default: an explanation follows the ratings
_ROTATION = 1_000_000
_MARKS = re.compile(r"[*`|\"]+")  # of Markdown and of the table that MM-Vet's prompt ends with
_LABEL = re.compile(
    r"^(?:the )?(?:final )?(?:correctness|scores?|ratings?|extracted answer)(?: score)?(?: is|:)+ ", re.I
)
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"


@dataclass(frozen=True)
class Work:
    """What has to be judged.

    Attributes:
        questions: index -> question.
        finish: takes index -> verdict (None: unrated), leaves what the evaluator reads, and returns the prediction
            file to evaluate and the indices left out.
    """

    questions: dict[str, Question]
    finish: Callable[[Mapping[str, str | None]], tuple[Path, list[str]]]


def rate(benchmark: Benchmark, dataset: Any, predictions: Path, judge: Judge, evaluator: str) -> tuple[Path, list[str]]:
    """Have the judge rate what needs it; returns the file to evaluate and the indices left out as unrated.

    Raises:
        JudgeError: no verdicts. ScoreMissing: nothing is left to score.
    """
    work = work_of(benchmark, dataset, predictions, evaluator)
    verdicts = judge.rate(list(work.questions.values()))
    return work.finish(dict(zip(work.questions, verdicts, strict=True)))


def work_of(benchmark: Benchmark, dataset: Any, predictions: Path, evaluator: str = "judged") -> Work:
    """The questions for a judge, and what to do with the verdicts.

    Raises:
        ScoreMissing: we know no wording for this data set.
    """
    table = answers.read(predictions)
    table["prediction"] = ["" if is_empty(text) else text for text in table["prediction"]]
    if isinstance(dataset, MMVet):
        return _mmvet(table, predictions, evaluator)
    if isinstance(dataset, LLaVABench):
        return _llavabench(table, predictions)
    if isinstance(dataset, MathVista):
        return _mathvista(table, predictions, evaluator)
    if isinstance(dataset, ImageYORNDataset):
        return _yes_no(table, dataset.dataset_name, predictions)
    if isinstance(dataset, ImageMCQDataset):
        return _multiple_choice(benchmark, dataset, table, predictions)
    kind = type(dataset).__name__
    raise ScoreMissing(f"{benchmark.name} is a {kind}, for which no judge is wired; use exact_matching")


# -- rated sets -----------------------------------------------------------------------------------------------------


def _mmvet(table: pd.DataFrame, predictions: Path, evaluator: str) -> Work:
    questions = {
        str(line["index"]): Question(
            "mmvet/2", mmvet.build_mmvet_gpt4_prompt(line), str(line["question"]), str(line["answer"]),
            line["prediction"], _share,
        )
        for _, line in table.iterrows()
        if not is_empty(line["prediction"])
    }  # fmt: skip

    def finish(verdicts: Mapping[str, str | None]) -> tuple[Path, list[str]]:
        rated, left_out = _split(table, verdicts)
        rated["score"] = [float(verdicts.get(str(i)) or 0) for i in rated["index"]]
        rated["log"] = "rated by ivcp-eval"
        dump(rated, get_intermediate_file_path(str(predictions), f"_{evaluator}"))
        return predictions, left_out

    return Work(questions, finish)


def mmvet_total(predictions: Path, evaluator: str) -> dict[str, float]:
    """The mean rating in percent, where VLMEvalKit's table fails because an ability has no sample (``--limit``)."""
    rated = read_table(predictions.parent, predictions.stem, f"_{evaluator}.tsv")
    total = 100 * float(rated["score"].astype(float).mean())
    table = pd.DataFrame([{"Category": "Overall", "tot": len(rated), "acc": total}])
    dump(table, get_intermediate_file_path(str(predictions), f"_{evaluator}_score", "csv"))
    return {"score": total}


def _llavabench(table: pd.DataFrame, predictions: Path) -> Work:
    questions = {
        str(line["index"]): Question(
            "llavabench/2", llavabench.build_prompt(line), str(line["question"]), str(line["gpt4_ans"]),
            line["prediction"], _two_ratings, _LLAVA_SYSTEM, _LLAVA_TOKENS,
        )
        for _, line in table.iterrows()
    }  # fmt: skip

    def finish(verdicts: Mapping[str, str | None]) -> tuple[Path, list[str]]:
        rated, left_out = _split(table, verdicts)
        pairs = [(verdicts[str(i)] or "nan nan").split() for i in rated["index"]]
        rated["gpt4_score"] = [float(pair[0]) for pair in pairs]
        # An empty answer is sent all the same: the reference needs its rating, beside which it has none.
        empty = rated["prediction"].map(is_empty)
        rated["score"] = [0.0 if e else float(pair[1]) for e, pair in zip(empty, pairs, strict=True)]
        dump(rated, get_intermediate_file_path(str(predictions), "_openai_result"))
        return predictions, left_out

    return Work(questions, finish)


def _mathvista(table: pd.DataFrame, predictions: Path, evaluator: str) -> Work:
    read = {
        str(line["index"]): answers.NO_ANSWER
        if is_empty(line["prediction"])
        else mathvista.post_check(line, prefetch=True)
        for _, line in table.iterrows()
    }
    questions = {
        str(line["index"]): Question(
            "mathvista/2", mathvista.build_mathvista_gpt4_prompt(line), str(line["question"]), "",
            line["prediction"], _plain, max_tokens=128,
        )
        for _, line in table.iterrows()
        if not read[str(line["index"])]
    }  # fmt: skip

    def finish(verdicts: Mapping[str, str | None]) -> tuple[Path, list[str]]:
        rated, left_out = _split(table, verdicts)
        rated["res"] = [read[str(i)] or verdicts[str(i)] for i in rated["index"]]
        rated["log"] = ["Prefetch succeed" if read[str(i)] else "Succeed" for i in rated["index"]]
        dump(rated, get_intermediate_file_path(str(predictions), f"_{evaluator}"))
        return predictions, left_out

    return Work(questions, finish)


def _plain(reply: str) -> str | None:
    """What was asked for, without emphasis, a label before it or a full stop after it; None if nothing is left."""
    text = " ".join(_MARKS.sub(" ", reply).split())
    return _LABEL.sub("", text).removesuffix(".").strip() or None


def _rated(text: str, best: int) -> float | None:
    """A number on the benchmark's scale, alone or as "of the best": 0.8/1; None for anything else."""
    match = re.fullmatch(rf"({_NUMBER})(?:\s*(?:/|out of)\s*{best}(?:\.0)?)?", text, re.ASCII)
    return float(match[1]) if match else None


def _share(reply: str) -> str | None:
    value = _rated(_plain(reply) or "", 1)
    return repr(value) if value is not None and 0 <= value <= 1 else None


def _two_ratings(reply: str) -> str | None:
    line = _plain(reply.splitlines()[0]) or ""
    words = re.sub(r"\s*(/|out of)\s*", r"\1", line.replace(",", " ")).split()
    pair = [_rated(word, 10) for word in words]
    return " ".join(map(repr, pair)) if len(pair) == 2 and all(value and 1 <= value <= 10 for value in pair) else None


# -- multiple choice, yes/no ----------------------------------------------------------------------------------------


def _yes_no(table: pd.DataFrame, name: str, predictions: Path) -> Work:
    unread = [
        line
        for _, line in table.iterrows()
        if not is_empty(line["prediction"]) and yorn.YOrN_Extraction(line["prediction"]) == "Unknown"
    ]
    questions = {
        str(line["index"]): Question(
            "yes_no/2", yorn.YOrN_match_prompt(line), str(line["question"]), "", line["prediction"], _yes_no_unknown
        )
        for line in unread
    }
    # MME scores the two questions on an image together, so one without a verdict takes the other along.
    group = (lambda line: (line["category"], line["image_path"])) if "MME" in name else (lambda line: line["index"])
    groups = {str(line["index"]): group(line) for _, line in table.iterrows()}
    return Work(questions, lambda verdicts: _replaced(predictions, verdicts, groups))


def _yes_no_unknown(reply: str) -> str | None:
    answer = yorn.YOrN_Extraction(_plain(reply) or "")
    if answer != "Unknown":
        return str(answer)
    return "Unknown" if "unknown" in reply.lower() else None


def _multiple_choice(benchmark: Benchmark, dataset: Any, table: pd.DataFrame, predictions: Path) -> Work:
    circular = bool(benchmark.samples and benchmark.samples.rule == "circular")
    items = table.rename(columns={c: c if c in string.ascii_uppercase else c.lower() for c in map(str, table)})
    if "MMMU" in dataset.dataset_name:
        items = multiple_choice.MMMU_preproc(items)
    truth = {str(i): answer for i, answer in zip(dataset.data["index"], dataset.data["answer"], strict=True)}
    scored = benchmark.samples.rows if benchmark.samples else {}
    questions: dict[str, Question] = {}
    lost: set[Any] = set()
    groups = {str(i): int(i) % _ROTATION if circular else i for i in items["index"]}
    for _, item in items.iterrows():
        index = str(item["index"])
        option = "Z" if is_empty(item["prediction"]) else multiple_choice.prefetch_answer(item)
        if option:
            lost |= {groups[index]} if circular and option != truth[index] else set()
        elif all(str(item[column]) == str(value) for column, value in scored.items()):
            questions[index] = _option_question(dataset.dataset_name, item)
    # A rotation that is wrong for certain decides its question; the others need not be paid for.
    questions = {index: question for index, question in questions.items() if groups[index] not in lost}
    return Work(questions, lambda verdicts: _replaced(predictions, verdicts, groups))


def _option_question(name: str, item: pd.Series) -> Question:
    choices = multiple_choice.build_choices(item)
    if name == "BLINK":
        wording = multiple_choice.build_prompt_blink
    elif cn_string(item["question"]):
        wording = multiple_choice.build_prompt_cn
    else:
        wording = multiple_choice.build_prompt
    prompt = wording(item["question"], build_option_str(choices), item["prediction"])

    def option(reply: str) -> str | None:
        return can_infer(_plain(reply) or "", dict(choices)) or None  # can_infer changes the choices it is given

    return Question("option/2", prompt, str(item["question"]), "", item["prediction"], option)


# -- handing over ---------------------------------------------------------------------------------------------------


def _split(table: pd.DataFrame, verdicts: Mapping[str, str | None]) -> tuple[pd.DataFrame, list[str]]:
    left_out = [index for index, verdict in verdicts.items() if verdict is None]
    rated = table[~table["index"].astype(str).isin(left_out)].copy()
    if rated.empty:
        raise ScoreMissing("the judge rated no answer")
    return rated, left_out


def _replaced(
    predictions: Path, verdicts: Mapping[str, str | None], groups: Mapping[str, Any]
) -> tuple[Path, list[str]]:
    """A copy of the prediction file with verdicts in the place of unreadable answers."""
    table = answers.read(predictions)
    indices = table["index"].astype(str)
    table["prediction"] = [
        verdicts.get(index) or answer for index, answer in zip(indices, table["prediction"], strict=True)
    ]
    unrated = {groups[index] for index, verdict in verdicts.items() if verdict is None}
    left_out = [index for index in indices if groups[index] in unrated]
    table = table[~indices.isin(left_out)]
    if table.empty:
        raise ScoreMissing("the judge rated no answer")
    target = predictions.parent / "judged" / predictions.stem
    target.parent.mkdir(exist_ok=True)
    return answers.write(table, target), left_out
