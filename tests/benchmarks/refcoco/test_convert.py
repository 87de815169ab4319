"""The converter end to end: the table, references, split sizes, refusals."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ivcp_eval.benchmarks.boxes import FORMATS, format_answer
from ivcp_eval.benchmarks.grounding import ground_truth, score
from ivcp_eval.benchmarks.refcoco.convert import convert_mdetr
from ivcp_eval.benchmarks.refcoco.images import encode_bytes, encode_file, ordered_map
from ivcp_eval.benchmarks.refcoco.records import COLUMNS, ConversionError, FrameRule
from ivcp_eval.benchmarks.refcoco.splits import SPLIT_SIZES
from tests.benchmarks.refcoco.data import Corpus, convert, count_reads, image_cells, names, options, picture, read_rows

ROOT = Path(__file__).parents[3]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return count_reads(monkeypatch)


def test_the_table(corpus: Corpus, reads: list[str]) -> None:
    report = convert(corpus)
    rows = read_rows(corpus.output / "RefCOCO_val.tsv")
    assert tuple(rows[0]) == COLUMNS
    assert [row["index"] for row in rows] == [1000, 1001, 1002, 1003, 1004, 1005]
    assert [len(str(row["image"])) > 64 for row in rows] == [True] * 3 + [False] * 3
    originals = [(corpus.pictures / corpus.file_name(i % 3)).read_bytes() for i in range(6)]
    assert image_cells(rows) == originals
    assert reads == [corpus.file_name(i) for i in range(3)]
    row = rows[4]
    assert (row["question"], row["answer"], row["split"]) == ("thing 4", "[4.0, 2.5, 24.25, 12.5]", "RefCOCO_val")
    assert (row["width"], row["height"], row["answer_width"], row["answer_height"]) == (64, 48, 64, 48)
    assert (row["image_id"], row["object_id"]) == (corpus.file_name(1), 1504)
    assert row["image_path"] == corpus.file_name(1) + ".png"
    assert (report["rows"], report["images"], report["skipped"], report["complete"]) == (6, 3, 0, False)
    assert names(corpus.output) == ["RefCOCO_val.tsv", "RefCOCO_val.tsv.report.json"]


def test_rows_can_be_scored_and_perfect_answers_are_perfect(corpus: Corpus) -> None:
    corpus.annotations[0]["bbox"] = [3, 4, 40, 40]
    convert(corpus)
    convert(corpus, rule=FrameRule(qwen25=True))
    plain = [ground_truth(row) for row in read_rows(corpus.output / "RefCOCO_val.tsv")]
    resized = [ground_truth(row) for row in read_rows(corpus.output / "RefCOCO_val_for_qwen25vl.tsv")]
    assert all(truth.answer_frame == (56, 56) for truth in resized)
    fmt = FORMATS["qwen2_5_vl"]
    # The model answers in the resized frame, whichever frame the file states its answers in.
    for truths in (plain, resized):
        pairs = [(truth, format_answer(truth.box, fmt, (56, 56))) for truth in truths]
        summary = score(pairs, fmt, lambda _: (56, 56)).summary()
        assert summary["Acc@0.75"] == 100.0
        assert summary["unparsable"] == 0
    assert score([(t, format_answer(t.box, fmt, (56, 56))) for t in resized], fmt, lambda _: (56, 56)).summary()[
        "mean_iou"
    ] == pytest.approx(1.0)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_output_does_not_depend_on_the_workers(workers: int, corpus: Corpus, tmp_path: Path) -> None:
    convert(corpus, workers=workers)
    other = convert_mdetr(corpus.path, corpus.pictures, tmp_path / "again", options())
    assert (tmp_path / "again" / "RefCOCO_val.tsv").read_bytes() == (corpus.output / "RefCOCO_val.tsv").read_bytes()
    assert other["bytes"] == (corpus.output / "RefCOCO_val.tsv").stat().st_size


def test_results_never_pile_up() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for taken in range(1, 101):
            yield -taken

    for done, value in enumerate(ordered_map(abs, items(), workers=2), start=1):
        assert value == done
        assert taken - done <= 8
    assert taken == 100


def test_known_splits_are_checked_against_their_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = Corpus(tmp_path, images=1, per_image=SPLIT_SIZES["RefCOCOg_val"], name="finetune_refcocog_val")
    for annotation, entry in zip(corpus.annotations, corpus.images, strict=True):
        annotation["bbox"], entry["dataset_name"] = [1, 2, 30, 30], "refcocog"
    report = convert(corpus, allow_partial=False)
    assert (report["complete"], report["rows"], report["images"]) == (True, 4896, 1)
    corpus.images.pop()
    corpus.annotations.pop()
    with pytest.raises(ConversionError, match="has 4895 expressions, RefCOCOg_val has 4896"):
        convert(corpus, allow_partial=False)
    for entry in corpus.images:
        entry["dataset_name"] = "refcoco+"
    with pytest.raises(ConversionError, match=r"dataset_name \['refcoco\+'\]; is the file misnamed"):
        convert(corpus)


def test_an_unknown_name_needs_allow_partial(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path, name="finetune_drone_test")
    with pytest.raises(ConversionError, match="not named like one of the eight splits"):
        convert(corpus, allow_partial=False)
    assert not corpus.output.exists()
    assert convert(corpus)["expected_rows"] is None
    assert (corpus.output / "drone_test.tsv").is_file()


def _missing(corpus: Corpus, path: Path) -> None:
    path.unlink()


def _folder(corpus: Corpus, path: Path) -> None:
    path.unlink()
    path.mkdir()


def _truncated(corpus: Corpus, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _no_image(corpus: Corpus, path: Path) -> None:
    path.write_bytes(b"<html>not found</html>")


def _other_size(corpus: Corpus, path: Path) -> None:
    path.write_bytes(picture(48, 64))


def _two_sizes(corpus: Corpus, path: Path) -> None:
    corpus.images[1]["width"] = 65


BROKEN = {
    _missing: "the image is missing from the images folder",
    _folder: "the image is missing from the images folder",
    _truncated: "the image is corrupt",
    _no_image: "the image is corrupt",
    _other_size: "the image has 48x64 pixels, the annotation says 64x48",
    _two_sizes: r"different sizes: \[\(64, 48\), \(65, 48\)\]",
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_image_stops_or_is_counted(spoil: Any, corpus: Corpus) -> None:
    spoil(corpus, corpus.pictures / corpus.file_name(1))
    target = corpus.output / "RefCOCO_val.tsv"
    with pytest.raises(ConversionError, match=rf"images\[1\] \(id 1001, .*{BROKEN[spoil]}"):
        convert(corpus)
    assert not target.exists()
    report = convert(corpus, skip_bad=True)
    assert [row["index"] for row in read_rows(target)] == [1000, 1002, 1003, 1005]
    assert report == json.loads((corpus.output / "RefCOCO_val.tsv.report.json").read_text())
    assert (report["rows"], report["skipped"], report["entries_in_source"]) == (4, 2, 6)
    assert sorted(entry["index"] for entry in report["skipped_entries"]) == ["1001", "1004"]
    assert names(corpus.output) == ["RefCOCO_val.tsv", "RefCOCO_val.tsv.report.json"]
    # The smaller file is never passed off as the whole one later.
    with pytest.raises(ConversionError):
        convert(corpus)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_every_picture_that_can_be_decoded_is_stored(corpus: Corpus, mode: str) -> None:
    path = corpus.pictures / corpus.file_name(1)
    path.write_bytes(picture(mode=mode))
    assert convert(corpus)["skipped"] == 0
    row = next(row for row in read_rows(corpus.output / "RefCOCO_val.tsv") if row["index"] == 1001)
    with Image.open(io.BytesIO(base64.b64decode(row["image"]))) as stored, Image.open(path) as given:
        assert stored.mode == ("RGB" if mode == "CMYK" else "L")
        assert stored.convert("RGB").tobytes() == given.convert("RGB").tobytes()


def test_all_bad_entries_are_reported_at_once_before_any_image_is_read(corpus: Corpus, reads: list[str]) -> None:
    corpus.images[0]["caption"] = ""
    corpus.annotations[2]["bbox"] = [0, 0, 0, 0]
    corpus.images[5]["file_name"] = "../secret.jpg"
    with pytest.raises(ConversionError) as caught:
        convert(corpus)
    message = str(caught.value)
    assert "3 unusable entries" in message
    for text in ("images[0] (id 1000", "images[2] (id 1002", "images[5] (id 1005", "../secret.jpg", "--skip-bad"):
        assert text in message
    assert reads == []
    assert len(caught.value.problems) == 3


def test_nothing_usable_is_an_error_even_when_skipping(corpus: Corpus) -> None:
    for entry in corpus.images:
        entry["caption"] = ""
    with pytest.raises(ConversionError, match="no usable entry"):
        convert(corpus, skip_bad=True)
    assert not (corpus.output / "RefCOCO_val.tsv").exists()


def test_the_report_says_where_qwen_departs_from_the_released_rule(corpus: Corpus) -> None:
    (corpus.pictures / "small.jpg").write_bytes(picture(20, 20))
    corpus.add(2000, "small.jpg", "small thing", [4, 4, 12, 12], size=(20, 20))
    departed = convert(corpus, rule=FrameRule(qwen25=True))["images_with_frame_unlike_released_converter"]
    assert departed == {"count": 1, "examples": {"small.jpg": "20x20 -> 56x56"}}
    assert convert(corpus)["images_with_frame_unlike_released_converter"]["count"] == 0


def test_other_picture_formats_are_kept_byte_for_byte() -> None:
    for kind, mode in (("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "L"), ("WEBP", "RGB"), ("BMP", "RGB")):
        image = encode_bytes(picture(kind=kind, mode=mode))
        assert (image.problem, image.width, image.height) == ("", 64, 48), (kind, mode)
    assert "cannot be read" in encode_file(Path("/nonexistent/a.jpg")).problem
