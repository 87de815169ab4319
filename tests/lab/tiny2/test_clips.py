"""The embedded clips: always the same bytes, and no single picture of one tells the answer."""

from __future__ import annotations

import ast
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd
import pytest

from ivcp_eval import benchmarks
from ivcp_eval.cli import main
from ivcp_eval.files import DATASETS
from ivcp_eval.lab.tiny2 import clips
from ivcp_eval.vlmeval_bridge.reading import tsv

OPTIONS = {"direction": 2, "order": 3, "first_move": 2, "entering": 3, "box_before": 4, "covered": 2}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """The file as a run reads it, its pictures as lists."""
    table = tsv.read(DATASETS / clips.NAME)
    return table.assign(image=table["image"].map(ast.literal_eval))


def test_the_generator_writes_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    declared = benchmarks.load("tiny_clips")
    content = (DATASETS / clips.NAME).read_bytes()
    assert clips.content() == content
    assert hashlib.sha256(content).hexdigest() == declared.sha256
    assert (declared.group, declared.n_samples) == ("more", content.count(b"\n") - 1)
    assert len(content) < 1_500_000
    command = ["lab", "build-benchmarks", "clips", "--out", str(tmp_path)]
    assert main([*command, "--split", "validation"]) == 0
    assert (tmp_path / clips.NAME).read_bytes() != content
    assert main([*command, "--check"]) == 1
    assert "differs from what the generator writes" in capsys.readouterr().err


@pytest.mark.parametrize("frame", range(clips.STEPS * clips.FRAMES_A_STEP))
def test_a_single_picture_is_at_chance(table: pd.DataFrame, frame: int) -> None:
    """Whoever knows the whole file, but sees one picture and its time, answers no better than a guess."""
    for category, rows in table.groupby("category"):
        seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        for question, pictures, answer in zip(rows["question"], rows["image"], rows["answer"], strict=True):
            seen[question, pictures[frame]][answer] += 1
        assert all(len(set(counts.values())) == 1 for counts in seen.values()), category
        assert {len(counts) for counts in seen.values()} == {OPTIONS[str(category)]}


def test_all_pictures_together_tell(table: pd.DataFrame) -> None:
    """In their order they have one answer; out of order, some questions have two."""
    whole = table.assign(image=table["image"].map(tuple))
    assert (whole.groupby(["question", "image"])["answer"].nunique() == 1).all()
    mixed = table.assign(image=table["image"].map(lambda pictures: tuple(sorted(pictures))))
    several = mixed.groupby(["category", "question", "image"])["answer"].nunique().groupby("category").max()
    assert (several[["direction", "order", "box_before"]] > 1).all()


def test_rows_fit_the_declaration(table: pd.DataFrame) -> None:
    """Equal times and sizes, every category among the first rows, as many options as answers."""
    assert {tuple(json.loads(cell)) for cell in table["seconds"]} == {tuple(i / 4 for i in range(16))}
    assert set(table["image"].map(len)) == {16}
    assert set(table["category"][:6]) == set(OPTIONS)
    for category, rows in table.groupby("category"):
        assert [bool(cell) for cell in rows.iloc[0][["A", "B", "C", "D"]]].count(True) == OPTIONS[str(category)]
    metrics = {metric.name for metric in benchmarks.load("tiny_clips").metrics}
    assert metrics == {"accuracy", *OPTIONS}
