"""YAML: what is read, and what is refused with file and line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.interface import marked
from ivcp_eval.interface.marked import Marked, SpecError


def read(folder: Path, text: str | bytes) -> Any:
    path = folder / "my.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Marked(path).value


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-0", 0), ("+3", 3), ("0.10", 0.1), (".5", 0.5), ("5.", 5.0), ("1e-05", 1e-5), ("1.5e+3", 1500.0),
     ("2e6", 2e6), (".inf", math.inf), ("'010'", "010"), ('"1:30"', "1:30"), ("08", "08"), ("e5", "e5"), ("12e", "12e"),
     ("true", True), ("", None), ("a word", "a word")],
)  # fmt: skip
def test_numbers_are_those_of_json(tmp_path: Path, text: str, value: Any) -> None:
    found = read(tmp_path, f"a: {text}")["a"]
    assert (found, type(found)) == (value, type(value))


def test_what_json_writes_comes_back(tmp_path: Path) -> None:
    """A run's spec is written as JSON, which workers read."""
    value = {"a": [1e-7, 2.5e20, -1, 0, 1e300], "b": {"c": "1e-05", "d": None, "e": True, "f": "010"}}
    assert read(tmp_path, json.dumps(value)) == value


REPEATED = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("b: 1\na: 010", 2, "'010' is 8 to YAML 1.1; write 8, or quotes around it"),
        ("b: 1\na: [1:30]", 2, "'1:30' is 90 to YAML 1.1"),
        ('b: 1\na: "\\UFFFFFFFF"', 2, "not YAML: "),
        ('b: 1\na: "\\U00110000"', 2, "not YAML: "),
        ('b: 1\na: "\\ud800"', 2, "holds half a character"),
        ("a: 0x10", 1, "'0x10' is 16"),
        ("a: 1_000", 1, "'1_000' is 1000"),
        ("a: 0b11", 1, "'0b11' is 3"),
        ("a: 1:30.5", 1, "'1:30.5' is 90.5"),
        ("a:\n  010: x", 2, "'010' is 8"),
        ("a: 2026-01-31", 1, "is a date to YAML"),
        ("a: !!binary aGk=", 1, "is a bytes to YAML"),
        ("a: !!int x", 1, "'x' is no int"),
        ("\na: !!python/name:os.system x\n", 2, "could not determine a constructor"),
        ("a: " + "9" * 5000, 1, "is no int"),
        ("a: &a [*a]", 1, "within one another"),
        ("a: " + "[" * 100_000, 1, "within one another"),
        (REPEATED, 1, "more than 100000 values"),
        ("a: 1\nb: \x07", 2, "not YAML"),
        (b"a: 1\nb: caf\xe9\n", 2, "byte 0xe9 is not UTF-8 text"),
        ("a: x\n" * 300_000, 1, "bytes, more than 1048576"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("a: *b", 1, "undefined alias"),
    ],
)
def test_refusals_name_file_and_line(tmp_path: Path, text: str | bytes, line: int, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'my.yaml'}, line {line}: ")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400


def test_tags_make_no_objects(tmp_path: Path) -> None:
    assert read(tmp_path, "a: !!python/object/apply:os.system [ls]") == {"a": ["ls"]}


def test_no_file_here_comes_near_the_bounds() -> None:
    root = Path(marked.__file__).parents[2]
    for path in (*(root / "datasets").glob("*.yaml"), *(root / "sweeps").glob("*.yaml")):
        document = Marked(path)
        assert len(document.lines) < marked.MOST_VALUES / 100
        assert path.stat().st_size < marked.MOST_BYTES / 100
