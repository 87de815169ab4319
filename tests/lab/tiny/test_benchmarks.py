"""The embedded benchmarks are what the generator writes, bit for bit, and are held out."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from ivcp_eval.benchmarks.lists import in_order, items
from ivcp_eval.lab.tiny import build_benchmarks
from ivcp_eval.lab.tiny.build_benchmarks import BENCHMARKS, CHECKSUMS, DATASETS, UNTAUGHT, encode_png
from ivcp_eval.lab.tiny.evaluate import read_benchmark
from ivcp_eval.lab.tiny.scenes import render, sample_scene, scene_rng
from ivcp_eval.lab.tiny.tasks import build_prompt, name_of

csv.field_size_limit(sys.maxsize)
ALL = BENCHMARKS | UNTAUGHT


def test_committed_files_are_regenerated_bit_equal() -> None:
    assert build_benchmarks.main(["--check"]) == 0


def test_check_fails_on_a_changed_file(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    for name in (*ALL, CHECKSUMS):
        (tmp_path / name).write_bytes((DATASETS / name).read_bytes())
    path = tmp_path / "tiny_mcq.tsv"
    path.write_bytes(path.read_bytes().replace(b"red", b"rad", 1))
    assert build_benchmarks.main(["--check", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "tiny_mcq.tsv" in error
    assert "tiny_short.tsv" not in error


def test_checksums_describe_the_files() -> None:
    table = json.loads((DATASETS / CHECKSUMS).read_text())
    assert set(table) == set(ALL)
    for name, entry in table.items():
        data = (DATASETS / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"]
        assert entry["rows"] == sum(ALL[name].quotas.values()) == len(read_benchmark(DATASETS / name))
        assert 200 <= entry["rows"] <= 500


@pytest.mark.parametrize("name", ALL)
def test_rows_point_at_their_picture_and_fill_their_quota(name: str) -> None:
    with (DATASETS / name).open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    by_index = {row["index"]: row for row in rows}
    assert len(by_index) == len(rows)
    for row in rows:
        if len(row["image"]) < 64:
            assert by_index[row["image"]]["image_id"] == row["image_id"]
            assert len(by_index[row["image"]]["image"]) >= 64
    categories = [row["category"] for row in rows]
    assert {c: categories.count(c) for c in set(categories)} == ALL[name].quotas


def test_pictures_are_the_scenes_pixels() -> None:
    question = read_benchmark(DATASETS / "tiny_grounding.tsv", 1)[0]
    expected = render(sample_scene(scene_rng("test", 0)))
    np.testing.assert_array_equal(np.asarray(question.image), expected)
    assert question.sample.box is not None
    assert build_prompt(question.sample).startswith("Locate ")


def test_png_survives_any_palette() -> None:
    image = np.random.default_rng(0).integers(0, 6, (17, 23, 3)).astype(np.uint8)
    decoded = Image.open(io.BytesIO(encode_png(image))).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decoded), image)
    noisy = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    with pytest.raises(ValueError, match="at most 256"):
        encode_png(noisy)


def test_lists_are_in_order_and_sums_add_up() -> None:
    questions = read_benchmark(DATASETS / "tiny_list.tsv")
    for question in questions[:40]:
        said = items(question.sample.answer)
        assert len(said) >= 2
        assert in_order(question.sample.answer, question.sample.answer) == 1
        if question.sample.category == "sum":
            total = 0
            for count, _, _, after in (item.split() for item in said):
                total += int(count)
                assert int(after) == total
    scene = sample_scene(scene_rng("test", 4_000_000))
    left_to_right = sorted(scene.objects, key=lambda o: o.box[0] + o.box[2])
    first = next(q.sample.answer for q in questions if q.sample.category == "order")
    assert first == ", ".join(name_of(o) for o in left_to_right)
