"""Questions to calibrate on: files are read or refused with the row, and no benchmark is taken."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ivcp_eval.files import DATASETS
from ivcp_eval.lab.calibration.questions import Question, from_file, generated, kinds
from ivcp_eval.lab.tiny.evaluate import read_benchmark


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (100, 50), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_jsonl(picture: Path, tmp_path: Path) -> None:
    cell = base64.b64encode(picture.read_bytes()).decode()
    rows = [
        {"image_path": "red.png", "question": "Which colour?", "answer": "red"},
        {"index": "second", "image": cell, "question": "Where?", "answer": "[10, 10, 50, 40]"},
        {"image": "second", "question": "What is there?"},
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = from_file(file)
    assert found.name == "asked.jsonl"
    assert [one.answer for one in found.questions] == ["red", (0.1, 0.2, 0.5, 0.8), None]
    assert {one.image.size for one in found.questions} == {(100, 50)}
    assert kinds(found.questions) == "3 questions, 1 of them without an answer"
    assert len(from_file(file, 1).questions) == 1


def test_tsv(picture: Path, tmp_path: Path) -> None:
    cell = base64.b64encode(picture.read_bytes()).decode()
    file = tmp_path / "asked.tsv"
    file.write_text(f"index\timage\tquestion\tanswer\n1\t{cell}\tWhich colour?\tred\n2\t1\tHow many?\t01\n")
    assert [(one.text, one.answer) for one in from_file(file).questions] == [
        ("Which colour?", "red"),
        ("How many?", "01"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1: no JSON"),
        ("[1]", "line 1: expected an object"),
        ('{"image_path": "red.png"}', "row 1: there is no `question`"),
        ('{"question": "Why?"}', "row 1: there is no picture"),
        ('{"question": "Why?", "image": "7"}', "row 1: image '7' is neither base64 nor"),
        ("", "holds no questions"),
    ],
)
def test_what_cannot_be_asked_is_named(picture: Path, tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=problem):
        from_file(file)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    file = tmp_path / "asked.jsonl"
    for row in ({"image_path": "none.png"}, {"image": "x" * 101}):
        file.write_text(json.dumps({"question": "Why?", **row}))
        with pytest.raises(OSError, match=r"asked.jsonl, row 1: "):
            from_file(file)


def test_no_benchmark_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = tmp_path / "mine.tsv"
    shutil.copy(DATASETS / "tiny_short.tsv", copied)
    with pytest.raises(ValueError, match=r"is a benchmark \(datasets/tiny_short.tsv\)"):
        from_file(copied)
    monkeypatch.setenv("LMUData", str(tmp_path / "data"))
    file = tmp_path / "data" / "POPE.jsonl"
    file.parent.mkdir()
    file.write_text("{}")
    with pytest.raises(ValueError, match="of VLMEvalKit"):
        from_file(file)


def test_generated_scenes_are_not_the_benchmarks() -> None:
    for one in generated(4):
        tested = {(q.image.tobytes(), q.sample.question) for q in read_benchmark(DATASETS / f"{one.name}.tsv", 40)}
        assert len(one.questions) == 4
        assert not {q.image.tobytes() for q in one.questions} & {picture for picture, _ in tested}
        assert all(q.answer is not None for q in one.questions)
        assert all(isinstance(q.answer, tuple) == (one.name == "tiny_grounding") for q in one.questions)


@pytest.mark.parametrize(
    ("right", "given", "agrees"),
    [
        ("A", "A. a red circle", True),
        ("yes", "Yes.", True),
        ("1", "12", False),
        ("red circle", "red", False),
        ("no", "nothing", False),
    ],
)
def test_answers_agree_at_word_ends(right: str, given: str, agrees: bool) -> None:
    assert Question(None, "", right).is_right(given, "") is agrees


def test_boxes_agree_from_half_an_overlap_on() -> None:
    question = Question(None, "", (0.0, 0.0, 0.5, 0.5))
    assert question.is_right("", "[0.0, 0.0, 0.5, 0.26]")
    assert not question.is_right("", "[0.0, 0.0, 0.5, 0.24]")
    assert not question.is_right("", "no box")
    with pytest.raises(ValueError, match="no answer"):
        Question(None, "Why?", None).is_right("because", "")
