"""Miniature TSVs with the columns and quirks of the real files, and three models whose scores are known by hand.

Each `Miniature` holds the rows of one file, what a right, a wrong and a half-right model answer, and the numbers that
VLMEvalKit's own evaluator must then leave. Columns: the table in VLMEvalKit's docs/en/Development.md and what its
evaluators read. Quirks that are reproduced: images stored once and referred to by index, several images in one cell,
rows without an image, options that are missing, answers that are lists in text, rotations at index + 1,000,000.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
from PIL import Image

from ivcp_eval.benchmarks.boxes import FORMATS, format_answer
from ivcp_eval.benchmarks.refcoco.records import COLUMNS as GROUNDING_COLUMNS

Row = dict[str, Any]
LETTERS = "ABCDEF"


@dataclass(frozen=True)
class Miniature:
    """One file and three models.

    Attributes:
        rows: of the TSV. right, wrong, half: index -> answer of each model.
        scores: metric -> its value for the three, in that order. dropped: rows that VLMEvalKit leaves out.
        judge: what a judge says to an answer, for sets that need one.
    """

    rows: Sequence[Row]
    right: Mapping[str, str]
    wrong: Mapping[str, str]
    half: Mapping[str, str]
    scores: Mapping[str, tuple[float, float, float]]
    dropped: int = 0
    judge: Callable[[str], str] | None = None

    def write(self, path: Any) -> None:
        """As VLMEvalKit's files are: tab-separated, missing cells empty."""
        pd.DataFrame(list(self.rows)).to_csv(path, sep="\t", index=False)


@cache
def picture(seed: int, size: tuple[int, int] = (32, 24)) -> str:
    """A base64 image; different seeds are different pictures."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (4, 3), random.Random(seed).randbytes(36)).resize(size).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _by_index(rows: Sequence[Row], answers: Sequence[str]) -> dict[str, str]:
    return {str(row["index"]): answer for row, answer in zip(rows, answers, strict=True)}


def _models(rows: Sequence[Row], right: Sequence[str], wrong: Sequence[str], half: Sequence[str]) -> dict[str, Any]:
    answers = {"right": right, "wrong": wrong, "half": half}
    return {"rows": rows, **{name: _by_index(rows, texts) for name, texts in answers.items()}}


# -- multiple choice ------------------------------------------------------------------------------------------------


def _options(n: int, number: int) -> Row:
    words = ("crimson", "turquoise", "ochre", "violet", "beige", "olive")
    return {LETTERS[i]: f"{words[i]} {number}" for i in range(n)}


def _mcq(extra: Callable[[int], Row], *, columns: Row | None = None, n: int = 4) -> Miniature:
    """``n`` questions; the last refers to the first one's image. The half-right model knows the first half."""
    rows = []
    for i in range(n):
        image = picture(i) if i < n - 1 else "0"
        options = _options(4 if i % 2 == 0 else 2, i)
        blank = dict.fromkeys("ABCD")
        answer = "AB"[i % 2]
        rows.append({"index": i, "image": image, "question": f"Which colour has thing {i}?", **blank, **options})
        rows[-1] |= {"answer": answer, **extra(i)}
    letters = [row["answer"] for row in rows]
    # All the ways in which people answer: the letter, the letter with its text, the text, a sentence.
    right = [_phrased(i, row["answer"], row) for i, row in enumerate(rows)]
    wrong = [("B" if letter == "A" else "A") for letter in letters]
    half = right[: n // 2] + wrong[n // 2 :]
    return Miniature(**_models(rows, right, wrong, half), scores={"accuracy": (100, 0, 50)})


def _phrased(i: int, letter: str, row: Row) -> str:
    text = row[letter]
    return (letter, f"{letter}. {text}", f"It is {text}.", f"The answer is ({letter})")[i % 4]


def _circular(question: str, split: str = "dev") -> Miniature:
    """Questions of 4, 2, 4 and 3 options, each with all its rotations; rotations refer to the first one's image."""
    rows: list[Row] = []
    for q, n in enumerate((4, 2, 4, 3)):
        texts = list(_options(n, q).values())
        for r in range(n):
            rotated = texts[r:] + texts[:r]
            row = {"index": q + r * 1_000_000, "question": question.format(q), "hint": None if q % 2 else f"Hint {q}."}
            row |= dict.fromkeys("ABCD") | dict(zip(LETTERS, rotated, strict=False))
            row |= {"answer": LETTERS[rotated.index(texts[0])], "image": picture(100 + q) if r == 0 else str(q)}
            row |= {"category": ("identity_reasoning", "ocr")[q % 2], "split": split}
            row["l2-category"] = ("attribute_reasoning", "finegrained_perception (instance-level)")[q % 2]
            rows.append(row)
    rows.sort(key=lambda row: row["index"])
    right = [row["answer"] for row in rows]
    wrong = ["B" if letter != "B" else "A" for letter in right]

    # Question 0 right, 1 right, 2 wrong in one rotation only, 3 wrong in all: 2 of 4.
    def half(row: Row, good: str, bad: str) -> str:
        q, r = row["index"] % 1_000_000, row["index"] // 1_000_000
        return bad if q == 3 or (q == 2 and r == 3) else good

    mixed = [half(*three) for three in zip(rows, right, wrong, strict=True)]
    return Miniature(**_models(rows, right, wrong, mixed), scores={"accuracy": (100, 0, 50)})


def _mmmu() -> Miniature:
    """Development and validation rows, several images in a cell, an open question without options."""
    rows = []
    for i, split in enumerate(["dev", "validation", "validation", "validation", "validation"]):
        images = [picture(200 + i), picture(300 + i)] if i % 2 else [picture(200 + i)]
        names = [f"validation_Art_{i}_{k}.png" for k in range(1, len(images) + 1)]
        row = {"index": f"{split}_Art_{i}", "question": f"See <image 1>. Which one, case {i}?", "split": split}
        row |= dict.fromkeys("ABCD") | ({} if i == 4 else _options(4, i))
        row |= {"answer": "forty" if i == 4 else "C", "category": "Art", "l2-category": "Art & Design"}
        row |= {"image": str(images) if len(images) > 1 else images[0]}
        row |= {"image_path": str(names) if len(names) > 1 else names[0]}
        rows.append(row)
    right = ["C", "C", "C", "C", "The answer is forty."]
    wrong = ["A", "A", "B", "D", "Other Answers"]
    # The development row does not count: 2 of the 4 validation rows.
    half = ["A", "C", "B", "A", "The answer is forty."]
    return Miniature(**_models(rows, right, wrong, half), scores={"accuracy": (100, 0, 50)})


def _blink() -> Miniature:
    base = _mcq(lambda i: {"category": ("Relative_Depth", "Jigsaw")[i % 2]})
    rows = [{**row, "image": str([picture(400 + i), picture(500 + i)])} for i, row in enumerate(base.rows)]
    return Miniature(rows, base.right, base.wrong, base.half, base.scores)


def _cv_bench(split: str) -> Miniature:
    """Three questions from ADE20K and one from COCO; in 2D the sources count alike, in 3D the questions do."""
    base = _mcq(
        lambda i: {
            "prompt": f"Case {i}: choose.\n(A) yes\n(B) no",
            "split": split,
            "source": "ADE20K" if i < 3 else "COCO",
            "category": "Count",
        }
    )
    half = dict(base.right) | {"3": base.wrong["3"]}
    return Miniature(base.rows, base.right, base.wrong, half, {"accuracy": (100, 0, 50 if split == "2D" else 75)})


# -- yes/no ---------------------------------------------------------------------------------------------------------

_MME = (
    *("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene"),
    *("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"),
)


def _mme() -> Miniature:
    """All 14 categories, two images each, a yes and a no question on each image, the second refers to the first."""
    rows = []
    for category in _MME:
        for k in range(2):
            for answer in ("Yes", "No"):
                index = len(rows)
                row = {"index": index, "category": category, "image_path": f"{category}/{k}.jpg", "answer": answer}
                row["image"] = picture(600 + index) if answer == "Yes" else str(index - 1)
                row["question"] = f"Is it {category} {k}, case {index}? Please answer yes or no."
                rows.append(row)
    right = [f"{row['answer']}." for row in rows]
    wrong = ["no" if row["answer"] == "Yes" else "Yes, it is." for row in rows]
    # Always "yes": half of the questions (50) and no image with both (0) in each of 14 categories.
    scores = {"total": (2800, 0, 700), "perception": (2000, 0, 500), "reasoning": (800, 0, 200)}
    return Miniature(**_models(rows, right, wrong, ["Yes"] * len(rows)), scores=scores)


def _pope() -> Miniature:
    facts = [
        ("Yes", "adversarial,popular,random"),
        ("No", "adversarial"),
        ("No", "popular"),
        ("Yes", "adversarial,popular,random"),
        ("No", "random"),
        ("No", "popular"),
    ]
    rows = [
        {"index": i, "image": picture(700) if i == 0 else "0", "question": f"Is there a thing {i} in the image?",
         "answer": answer, "category": category}
        for i, (answer, category) in enumerate(facts)
    ]  # fmt: skip
    right = [answer.lower() for answer, _ in facts]
    wrong = ["No" if answer == "Yes" else "Yes" for answer, _ in facts]
    # Always "yes", each question once per category: 6 hits, 4 false alarms, no miss.
    scores = {"F1": (100, 0, 75), "accuracy": (100, 0, 60), "precision": (100, 0, 60), "recall": (100, 0, 100)}
    return Miniature(**_models(rows, right, wrong, ["Yes"] * 6), scores=scores)


def _hallusion() -> Miniature:
    """Index: number, category, l2-category, set, figure, question. Rows without an image are left out."""
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (2, 0, 0)]
    rows = [
        {"index": f"0_VD_illusion_{s}_{f}_{q}", "category": "VD", "l2-category": "illusion", "answer": "Yes",
         "image": picture(800 + 10 * s + f), "question": f"Are the lines of set {s}, figure {f} alike, {q}?"}
        for s, f, q in places
    ]  # fmt: skip
    rows[-1] |= {"image": None, "category": "VS"}
    right, wrong = ["Yes"] * 6, ["No"] * 6
    # Right: (set 0, figure 0, question 0), (0, 1, 0), (1, 0, 0). Figures all right: only (1, 0) of three; questions
    # right on all their figures: (0, 0) and (1, 0) of three.
    half = ["Yes", "No", "Yes", "No", "Yes", "Yes"]
    scores = {"aAcc": (100, 0, 60), "fAcc": (100, 0, 100 / 3), "qAcc": (100, 0, 200 / 3)}
    return Miniature(**_models(rows, right, wrong, half), scores=scores, dropped=1)


# -- short answers --------------------------------------------------------------------------------------------------


def _vqa(answers: Sequence[Any], right: Sequence[str], half: Sequence[str], metric: str, value: float) -> Miniature:
    rows = [
        {"index": i, "image": picture(900 + i), "question": f"What does sign {i} say?", "answer": answer}
        for i, answer in enumerate(answers)
    ]
    wrong = ["quite another thing altogether"] * len(rows)
    return Miniature(**_models(rows, right, wrong, half), scores={metric: (100, 0, value)})


def _textvqa() -> Miniature:
    ten = [str(["stop"] * 10), str(["exit"] * 7 + ["out"] * 3), str(["nokia"] * 10), str(["3"] * 9 + ["three"])]
    # "out" was said by three: each of them finds two others (2/3), each other finds three (1): 0.9.
    return _vqa(ten, ["Stop", "exit", "The nokia", "3"], ["stop", "out", "samsung", "4"], "accuracy", 47.5)


def _anls() -> Miniature:
    answers = [str(["apple", "an apple"]), str(["1,000"]), str(["Table of contents"]), str(["red"])]
    # One letter of five wrong (0.8), right (1), two letters of three wrong (below one half: 0), wrong.
    half = ["appla", "1,000", "nothing", "rxx"]
    return _vqa(answers, ["apple", "1,000", "table of  contents", "Red"], half, "ANLS", 45)


def _chartqa() -> Miniature:
    base = _vqa(["14", "Yes", "0.57", "2015"], ["14", "yes", "57%", "2015"], ["14.6", "No", "0.6", "2015"], "x", 0)
    rows = [{**row, "split": ("test_human", "test_augmented")[i > 1]} for i, row in enumerate(base.rows)]
    # 14.6 is within 5 % of 14, 0.6 is not within 5 % of 0.57; a year within 5 % would be.
    scores = {"accuracy": (100, 0, 50), "human": (100, 0, 50), "augmented": (100, 0, 50)}
    return Miniature(rows, base.right, base.wrong, base.half, scores)


def _gqa() -> Miniature:
    return _vqa(["left", "yes", "dog", "2"], ["Left", "yes", "dog", "2"], ["left", "Yes", "cat", "3"], "accuracy", 50)


def _ocrbench() -> Miniature:
    formula = "Handwritten Mathematical Expression Recognition"
    facts = [
        ("Regular Text Recognition", ["CENTRE"], "The word is centre.", "center"),
        ("Scene Text-centric VQA", ["pepsi", "Pepsi Cola"], "pepsi cola", "a drink"),
        ("Doc-oriented VQA", ["12.5"], "It was 12.5 in all", "1.25"),
        ("Key Information Extraction", ["Kuala\nLumpur"], "kuala lumpur", "Kuala"),
        (formula, ["x ^ { 2 }"], "x^{2}", "X^{2}"),
        (formula, ["\\frac a b"], "\\frac ab", "a/b"),
    ]
    rows = [
        {"index": i, "image": picture(1000 + i), "question": f"Read it, case {i}.", "answer": str(answers),
         "category": category}
        for i, (category, answers, _, _) in enumerate(facts)
    ]  # fmt: skip
    right, wrong = [fact[2] for fact in facts], [fact[3] for fact in facts]
    return Miniature(**_models(rows, right, wrong, right[:3] + wrong[3:]), scores={"final score": (6, 0, 3)})


# -- rated by a judge -----------------------------------------------------------------------------------------------


def _mmvet() -> Miniature:
    kinds = ["rec,know", "ocr,math", "rec,gen", "spat", "rec,spat"]
    truths = ["x <AND> y", "4", "a <OR> b", "left", "right"]
    rows = [
        {"index": f"v1_{i}", "image": picture(1100 + i), "question": f"Tell me about {i}.", "answer": truths[i],
         "category": kinds[i]}
        for i in range(5)
    ]  # fmt: skip
    right, wrong = [f"good {i}" for i in range(5)], [f"bad {i}" for i in range(5)]
    half = ["good 0", "middling 1", "bad 2", "middling 3", "bad 4"]

    def judge(answer: str) -> str:
        return {"good": "1.0", "bad": "0.0", "middling": "0.4"}[answer.split()[0]]

    return Miniature(**_models(rows, right, wrong, half), scores={"score": (100, 0, 36)}, judge=judge)


def _llavabench() -> Miniature:
    rows = [
        {"index": i, "image": picture(1200 + i), "question": f"Describe {i}.", "category": kind,
         "caption": "['A room.']", "gpt4_ans": "A large room."}
        for i, kind in enumerate(("conv", "detail", "complex"))
    ]  # fmt: skip
    right, wrong, half = (["good"] * 3), (["bad"] * 3), ["good", "bad", "bad"]

    def judge(answer: str) -> str:
        return "8 10\nBecause." if answer == "good" else "8, 4"

    scores = {"relative score": (125, 50, 75), "VLM score": (100, 40, 60)}
    return Miniature(**_models(rows, right, wrong, half), scores=scores, judge=judge)


def _mathvista() -> Miniature:
    facts = [
        ("multi_choice", "text", "B", "['3/11', '8/11']", "8/11", "B", "A"),
        ("free_form", "integer", "", "", "14", "14", "15"),
        ("free_form", "float", "", "", "1.5", "it is one and a half", "it is two"),
        ("free_form", "text", "", "", "circle", "I see a circle", "I see a square"),
    ]
    rows = [
        {"index": i + 1, "image": picture(1300 + i), "question": f"Hint: think.\nQuestion: case {i}?",
         "question_type": question, "answer_type": kind, "answer_option": option or None, "choices": choices or None,
         "answer": answer, "task": "geometry problem solving", "skills": "['geometry reasoning']"}
        for i, (question, kind, option, choices, answer, _, _) in enumerate(facts)
    ]  # fmt: skip
    right, wrong = [fact[5] for fact in facts], [fact[6] for fact in facts]

    def judge(answer: str) -> str:
        return {"it is one and a half": "1.5", "it is two": "2.0"}.get(answer, answer.split()[-1])

    # A text answer can never be right: VLMEvalKit's post_check compares the truth with str(None).
    scores = {"accuracy": (75, 0, 50)}
    return Miniature(**_models(rows, right, wrong, right[:2] + wrong[2:]), scores=scores, judge=judge)


# -- grounding ------------------------------------------------------------------------------------------------------


def _grounding(index: int) -> Miniature:
    """Boxes of 10 to 60 percent of 200x100 images; the first two expressions share one, as the converter writes."""
    rows = []
    for i in range(4):
        row: Row = dict.fromkeys(GROUNDING_COLUMNS, "")
        row |= {"index": index + i, "image": picture(1400 + i, (200, 100)) if i != 1 else str(index), "width": 200}
        row |= {"height": 100, "answer_width": 200, "answer_height": 100, "answer": "[20, 10, 120, 60]"}
        row |= {"question": f" thing {i} on the left ", "object_id": 7 + i, "split": "val"}
        row["image_id"] = f"COCO_train2014_{max(i, 1):012d}.jpg"
        row["image_path"] = row["image_id"].replace(".jpg", ".png")
        rows.append(row)

    def box(*corners: float) -> str:
        return format_answer(tuple(corners), FORMATS["unit"])  # type: ignore[arg-type]

    exact, far = box(0.1, 0.1, 0.6, 0.6), box(0.7, 0.7, 0.9, 0.9)
    # IoU 1, 0.8 (four fifths of the box), none, 0.
    half = [exact, box(0.1, 0.1, 0.5, 0.6), "no box", far]
    scores = {"Acc@0.5": (100, 0, 50), "Acc@0.75": (100, 0, 50), "Acc@0.9": (100, 0, 25), "mean IoU": (1, 0, 0.45)}
    return Miniature(**_models(rows, [exact] * 4, [far] * 4, half), scores=scores)


GROUNDING = (
    *("RefCOCO_val", "RefCOCO_testA", "RefCOCO_testB", "RefCOCO+_val", "RefCOCO+_testA", "RefCOCO+_testB"),
    *("RefCOCOg_val", "RefCOCOg_test"),
)


def _easy_vqa() -> Miniature:
    """One-word answers in three categories, as ``ivcp lab easy-vqa`` writes them; the half-right model knows yes_no."""
    asked = (("no", "yes_no"), ("yes", "yes_no"), ("circle", "shape"), ("teal", "colour"))
    rows = [
        {"index": i + 1, "image": picture(i), "question": f"what is {i}?", "answer": a, "category": c, "image_id": i}
        for i, (a, c) in enumerate(asked)
    ]
    right = [answer.capitalize() for answer, _ in asked]
    wrong = ["triangle"] * 4
    scores = {"accuracy": (100, 0, 50)}
    return Miniature(**_models(rows, right, wrong, right[:2] + wrong[2:]), scores=scores)


@cache
def miniatures() -> Mapping[str, Miniature]:
    """By benchmark name."""
    category = lambda i: {"category": ("Scene Understanding", "Instance Counting")[i % 2]}  # noqa: E731
    l2 = lambda i: {"category": "coarse perception", "l2-category": f"kind {i % 2}", "bench": "MMMU"}  # noqa: E731
    return {
        **{name: _grounding(1000 * i) for i, name in enumerate(GROUNDING)},
        "SEEDBench_IMG": _mcq(category),
        "MMBench_DEV_EN_V11": _circular("Who is person {}?"),
        "MMStar": _mcq(l2),
        "MME": _mme(),
        "POPE": _pope(),
        "HallusionBench": _hallusion(),
        "RealWorldQA": _mcq(lambda i: {}),
        "TextVQA_VAL": _textvqa(),
        "AI2D_TEST": _mcq(lambda i: {"category": ("foodChain", "lifeCycles")[i % 2]}),
        "MMVet": _mmvet(),
        "OCRBench": _ocrbench(),
        "ChartQA_TEST": _chartqa(),
        "DocVQA_VAL": _anls(),
        "InfoVQA_VAL": _anls(),
        "MMMU_DEV_VAL": _mmmu(),
        "MathVista_MINI": _mathvista(),
        "ScienceQA_TEST": _mcq(lambda i: {"hint": "A context." if i % 2 else None, "category": "physics"}),
        "GQA_TestDev_Balanced": _gqa(),
        "BLINK": _blink(),
        "VStarBench": _mcq(lambda i: {"category": "direct_attributes"}),
        "CV-Bench-2D": _cv_bench("2D"),
        "CV-Bench-3D": _cv_bench("3D"),
        "LLaVABench": _llavabench(),
        "MMBench_DEV_CN_V11": _circular("第{}个人是谁"),
        "easy_vqa": _easy_vqa(),
    }
