"""The second embedded model's benchmark files, and easy-VQA's, are what VLMEvalKit and the acceptance read."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ivcp_eval.cli import main
from ivcp_eval.lab.tiny2 import evaluate, tasks
from ivcp_eval.lab.tiny2.scenes import sample_scene, scene_rng
from ivcp_eval.vlmeval_bridge.reading import tsv


@pytest.mark.parametrize("task", ["grounding", "short"])
def test_files_hold_the_questions_of_the_acceptance(task: str, tmp_path: Path) -> None:
    command = ["lab", "build-benchmarks", "tiny2", "--out", str(tmp_path), "--split", "validation", "--questions", "5"]
    assert main(command) == 0
    table = tsv.read(tmp_path / f"tiny2_{task}.tsv")
    asked = list(evaluate.questions("validation", 5, task))
    assert table["question"].tolist() == [q.sample.question for q in asked]
    assert table["image_id"].tolist() == [q.cluster for q in asked]
    for row, question in zip(table.to_dict("records"), asked, strict=True):
        sample = question.sample
        assert json.loads(row["answer"]) == list(sample.box) if sample.box else row["answer"] == sample.answer
        own = row if len(row["image"]) > tsv.REFERENCE else table[table["index"] == row["image"]].iloc[0]
        (tmp_path / "picture.png").write_bytes(base64.b64decode(own["image"]))
        with Image.open(tmp_path / "picture.png") as picture:
            assert np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(question.images[0]))


@pytest.fixture
def easy_vqa(tmp_path: Path) -> Path:
    """Two pictures in easy-VQA's layout."""
    folder = tmp_path / "test"
    (folder / "images").mkdir(parents=True)
    for number, colour in enumerate(("red", "teal")):
        Image.new("RGB", (64, 64), colour).save(folder / "images" / f"{number}.png")
    questions = [
        ["what is the red shape?", "triangle", 0],
        ["is there a blue shape?", "no", 0],
        ["what is the color of the shape?", "teal", 1],
    ]
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


def test_easy_vqa_becomes_a_table(easy_vqa: Path, tmp_path: Path) -> None:
    assert main(["lab", "easy-vqa", str(easy_vqa), "--out", str(tmp_path / "easy_vqa.tsv")]) == 0
    table = tsv.read(tmp_path / "easy_vqa.tsv")
    assert table["answer"].tolist() == ["triangle", "no", "teal"]
    assert table["category"].tolist() == ["shape", "yes_no", "colour"]
    assert table["image"][1] == table["index"][0]
    assert base64.b64decode(table["image"][2]) == (easy_vqa / "images" / "1.png").read_bytes()


def test_another_format_is_refused_and_nothing_written(easy_vqa: Path, tmp_path: Path) -> None:
    (easy_vqa / "questions.json").write_text('[["what is the red shape?", "triangle", 0], {"question": "?"}]')
    assert main(["lab", "easy-vqa", str(easy_vqa), "--out", str(tmp_path / "easy_vqa.tsv")]) == 2
    assert not (tmp_path / "easy_vqa.tsv").exists()


def test_the_census_counts_what_the_scene_holds() -> None:
    for index in range(20):
        scene = sample_scene(scene_rng("validation", index))
        said = dict(line.rsplit(" ", 1) for line in tasks.census(scene).answer.split("\n"))
        assert sum(map(int, said.values())) == 2 * len(scene.objects)
        for item in scene.objects:
            assert int(said[item.colour]) == sum(o.colour == item.colour for o in scene.objects)
            assert int(said[item.shape]) == sum(o.shape == item.shape for o in scene.objects)
