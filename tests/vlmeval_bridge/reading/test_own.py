"""A user's own JSONL or TSV as a benchmark: what it becomes, and what is refused before a byte is written."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import pictures
from ivcp_eval.vlmeval_bridge.reading import own, tsv

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A file of lines beside three pictures of 40 x 30 pixels, in a data root of its own."""
    monkeypatch.setenv("LMUData", str(tmp_path / "LMUData"))
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 10, 10)).save(folder / f"{i}.png")

    def written(*lines: Mapping[str, Any] | str, name: str = "photos_of_mine.jsonl") -> Path:
        path = folder / name
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return written


def asked(i: int = 0, **more: Any) -> dict[str, Any]:
    return {"image": f"{i}.png", "question": "What is this?", **more}


def table_of(name: str) -> pd.DataFrame:
    path = benchmarks.load(name).path
    assert path is not None
    return tsv.read(path)


@pytest.mark.parametrize(
    ("answers", "kind", "cells"),
    [
        (["a cat", "dog"], "short_answer", ["a cat", "dog"]),
        ([["cat", "a cat"], "[dog]"], "short_answer", ["['cat', 'a cat']", "['[dog]']"]),
        (["Yes", "no"], "yes_no", ["Yes", "No"]),
        ([[1, 2, 30, 20], "(0, 0, 40, 30)"], "grounding", ["[1.0, 2.0, 30.0, 20.0]", "[0.0, 0.0, 40.0, 30.0]"]),
        ([7, 2.5], "short_answer", ["7", "2.5"]),
    ],
)
def test_the_kind_follows_from_the_answers(write: Write, answers: list[Any], kind: str, cells: list[str]) -> None:
    said: list[str] = []
    name = own.add(write(*(asked(i, answer=answer) for i, answer in enumerate(answers))), say=said.append)
    benchmark, table = benchmarks.load(name), table_of(name)
    assert (name, benchmark.kind, benchmark.group, benchmark.reference) == ("photos_of_mine", kind, "own", "answers")
    assert list(table["answer"]) == cells
    assert f"2 questions of the kind {kind}" in said[0]
    assert name in benchmarks.expand(["own"])
    if kind == "grounding":
        assert list(table["width"]) == ["40", "40"]


def test_options_as_list_or_letters_and_answers_as_letter_or_text(write: Write) -> None:
    path = write(
        asked(0, options=["red", "blue"], answer="blue", category="colour", index="a"),
        asked(1, options={"A": "x", "B": "y", "C": "z"}, answer="A", category="shape", index="b"),
    )
    table = table_of(own.add(path, name="choice"))
    assert benchmarks.load("choice").kind == "mcq"
    assert list(table["answer"]) == ["B", "A"]
    assert table[["index", "A", "C", "category"]].to_numpy().tolist() == [
        ["a", "red", "", "colour"],
        ["b", "x", "z", "shape"],
    ]


def test_text_arrives_as_it_is_and_several_pictures_stay_in_order(write: Write) -> None:
    question = '<script>alert(1)</script> "quoted"\tand\nsecond line'
    table = table_of(own.add(write({"image": ["2.png", "0.png"], "question": question})))
    assert table["question"][0] == question
    shown = [pictures.decoded(io.BytesIO(base64.b64decode(cell))) for cell in ast.literal_eval(table["image"][0])]
    assert [picture.getpixel((0, 0))[0] for picture in shown] == [160, 0]
    assert "answer" not in table


def test_a_picture_that_a_camera_turned_is_turned(write: Write) -> None:
    path = write({"image": "turned.jpg", "question": "?", "answer": [0, 0, 30, 40]})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(path.with_name("turned.jpg"), exif=exif)
    table = table_of(own.add(path))
    assert (table["width"][0], table["height"][0]) == ("30", "40")


def test_the_same_file_is_added_once_and_a_changed_one_replaces_it(write: Write, tmp_path: Path) -> None:
    said: list[str] = []
    own.add(write(asked(answer="a")), say=said.append)
    before = benchmarks.load("photos_of_mine")
    own.add(write(asked(answer="a")), say=said.append)
    assert len(said) == 1
    own.add(write(asked(answer="b")), say=said.append)
    assert "replaced" in said[1]
    assert benchmarks.load("photos_of_mine").sha256 != before.sha256
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (9, 9)).save(other / "0.png")
    (other / "photos_of_mine.jsonl").write_text(json.dumps(asked(answer="c")))
    with pytest.raises(own.BadData, match=r"was made of .*photos/photos_of_mine.jsonl before; .*--name"):
        own.add(other / "photos_of_mine.jsonl")


def test_a_tsv_is_a_benchmark_too(write: Write) -> None:
    made = benchmarks.load(own.add(write(asked(0, answer="yes"), asked(1, answer="no")))).path
    assert made is not None
    copy = write(name="elsewhere.tsv")
    copy.write_bytes(made.read_bytes())
    assert own.names_of([str(copy), "POPE"], lambda text: None) == ["elsewhere", "POPE"]
    assert benchmarks.load("elsewhere").kind == "yes_no"
    assert table_of("elsewhere").equals(table_of("photos_of_mine"))


GOOD = asked(answer="x")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "the file has no lines"),
        ([GOOD, '{"image": "0.png", "quest'], "line 2: not JSON"),
        ([GOOD, "[1]"], "line 2: an object with image and question is expected, got a list"),
        (["[" * 100_000], "line 1: (brackets within brackets|not JSON)"),
        ([GOOD, asked(7, answer="x")], "line 2: image '7.png': there is no such file"),
        ([{**GOOD, "image": "../LMUData"}], "line 1: image '../LMUData' leads out of"),
        ([{**GOOD, "image": "/etc/hostname"}], "line 1: image '/etc/hostname' leads out of"),
        ([{**GOOD, "image": "link.png"}], "line 1: image 'link.png' leads out of"),
        ([{**GOOD, "image": "pipe.png"}], "line 1: image 'pipe.png': there is no such file"),
        ([{**GOOD, "image": "a\0.png"}], "line 1: image"),
        ([{**GOOD, "image": "photos_of_mine.jsonl"}], r"line 1: picture photos_of_mine.jsonl cannot be used"),
        ([{**GOOD, "image": "cut.png"}], "line 1: picture cut.png cannot be used"),
        ([{**GOOD, "image": "bomb.png"}], "line 1: picture bomb.png cannot be used .*30000 x 30000 pixels"),
        ([{**GOOD, "image": []}], "line 1: image must be a path"),
        ([{**GOOD, "index": "a"}, {**GOOD, "index": "a"}], "line 2: index 'a' is that of line 1 too"),
        ([{**GOOD, "index": 2}, GOOD], "line 2: index '2' is that of line 1 too"),
        ([GOOD, {**GOOD, "index": "../../x"}], "line 2, column index: an index names the file"),
        ([{**GOOD, "index": "().__class__"}], "line 1, column index: VLMEvalKit would evaluate it"),
        ([GOOD, {**GOOD, "answer": "__import__('os').getcwd()"}], "line 2, column answer: VLMEvalKit would run"),
        ([{**GOOD, "question": "\0"}], "line 1: question holds a NUL"),
        ([{**GOOD, "question": "\ud800"}], "line 1: question holds a NUL or half a character"),
        ([{**GOOD, "question": " "}], "line 1: question must be a text that is not empty"),
        ([{**GOOD, "anwser": "x"}], "line 1: unknown 'anwser'; allowed: image, video, nframe, fps, seconds, question"),
        (['{"image": "0.png", "image": "1.png", "question": "?"}'], "line 1: a key stands twice"),
        ([GOOD, asked()], "line 2: no answer, but other lines have one"),
        ([{**GOOD, "options": ["x", "y"]}, GOOD], "line 2: no options"),
        ([{**GOOD, "options": ["y", "z"]}], "line 1: answer 'x' is neither a letter of the options nor"),
        ([{**GOOD, "options": {"A": "x", "C": "y"}}], "line 1: options must be a list of 2 to 26"),
        ([asked(answer=[0, 0, 41, 30])], r"line 1: answer .* is no box in the picture of 40 x 30 pixels"),
        ([asked(answer=True)], "line 1: answer must be a text"),
        (["x" * (own.MOST_BYTES_A_LINE + 1)], "line 1: more than 1048576 bytes"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_lines_are_named_and_nothing_is_written(write: Write, lines: list[Any], said: str) -> None:
    path = write(*lines)
    (path.with_name("link.png")).symlink_to("/etc/hostname")
    os.mkfifo(path.with_name("pipe.png"))
    path.with_name("cut.png").write_bytes(path.with_name("0.png").read_bytes()[:60])
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    bomb += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    path.with_name("bomb.png").write_bytes(bomb)
    with pytest.raises(own.BadData, match=f"{path.name}[,:] {said}"):
        own.add(path)
    assert "photos_of_mine" not in benchmarks.names()
    assert not benchmarks.own_folder().is_dir() or list(benchmarks.own_folder().iterdir()) == []


def test_every_bad_line_is_said_at_once(write: Write) -> None:
    with pytest.raises(own.BadData) as caught:
        own.add(write("{", GOOD, asked(8, answer="x"), "{}"))
    assert [f"line {n}:" in str(caught.value) for n in (1, 2, 3, 4)] == [True, False, True, True]


TAKEN = ("POPE", "pope", "tiny_mcq", "TINY_MCQ", "matrix", "own", "MMBench_DEV_EN")


@pytest.mark.parametrize("name", [*TAKEN, "circular", "MME_2", "my photos", "a/b", ".."])
def test_names_that_are_taken_or_special_are_refused(write: Write, name: str) -> None:
    with pytest.raises(own.BadData, match="give it another name: `ivcp data add"):
        own.add(write(GOOD), name=name)
    assert not benchmarks.own_folder().exists()


def test_what_was_said_once_holds_when_an_eval_reads_the_file_again(write: Write) -> None:
    path = write(asked())
    own.add(path, kind="grounding", prompt="dataset")
    own.names_of([str(path)], lambda text: None)
    known = benchmarks.load("photos_of_mine")
    assert (known.kind, known.prompt) == ("grounding", "dataset")
    own.add(path, kind="short_answer", prompt="family")
    known = benchmarks.load("photos_of_mine")
    assert (known.kind, known.prompt) == ("short_answer", "family")
    own.add(write(asked(answer="yes")))
    assert benchmarks.load("photos_of_mine").kind == "short_answer", "as before, since it fits"
    own.add(write(asked(answer="a", options=["a", "b"])))
    assert benchmarks.load("photos_of_mine").kind == "mcq", "no other kind has options"
    with pytest.raises(own.BadData, match="unknown prompt 'mine'; allowed: family, dataset"):
        own.add(path, prompt="mine")


def test_a_kind_may_be_said_and_must_fit(write: Write) -> None:
    path = write(asked())
    own.add(path, kind="grounding")
    assert benchmarks.load("photos_of_mine").metrics[0].name == "agreement_iou@0.5"
    with pytest.raises(own.BadData, match="unknown kind 'caption'; allowed: mcq, yes_no, grounding, short_answer"):
        own.add(path, kind="caption")
    with pytest.raises(own.BadData, match="line 1: answer 'x' is neither yes nor no"):
        own.add(write(GOOD), kind="yes_no")
