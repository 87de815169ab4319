"""VLMEvalKit's stock RefCOCO.tsv: taken apart into the eight splits, each image stored once."""

from __future__ import annotations

import base64
import csv
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ivcp_eval.benchmarks.grounding import ground_truth
from ivcp_eval.benchmarks.refcoco import stock as stock_module
from ivcp_eval.benchmarks.refcoco.images import encode_bytes
from ivcp_eval.benchmarks.refcoco.records import ConversionError, FrameRule
from ivcp_eval.benchmarks.refcoco.splits import SPLIT_SIZES
from ivcp_eval.benchmarks.refcoco.stock import convert_stock
from ivcp_eval.benchmarks.refcoco.writer import Options
from ivcp_eval.cli import main
from tests.benchmarks.refcoco.data import image_cells, picture

PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
PICTURES = [base64.b64encode(picture(seed=n)).decode() for n in range(3)]


def _row(index: int, image: int = 0, category: str = "RefCOCO val", **changes: Any) -> dict[str, Any]:
    row = {"index": index, "image": PICTURES[image], "question": PROMPT.format(f"thing {index}"), "category": category}
    box = {"bbox_x1": 6.4, "bbox_y1": 4.8, "bbox_x2": 32.0, "bbox_y2": 24.0}
    return row | {"answer": "[0.1, 0.1, 0.5, 0.5]", "width": 64.0, "height": 48} | box | changes


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _convert(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    path = tmp_path / "RefCOCO.tsv"
    if not path.exists():
        _write(path, rows)
    return convert_stock(path, tmp_path / "out", Options(**({"allow_partial": True} | changes)))


def _read(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    return pd.read_csv(tmp_path / "out" / f"{name}.tsv", sep="\t").to_dict("records")


ROWS = [
    _row(0, 0),
    _row(1, 1),
    _row(0, 0, "RefCOCO+ testA"),
    _row(2, 0),
    _row(1, 0, "RefCOCO+ testA", question=PROMPT.format('the "red"\none')),
]


def test_splits_references_and_bare_expressions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(stock_module, "encode_bytes", lambda content: decoded.append(1) or encode_bytes(content))
    reports = _convert(tmp_path, ROWS)
    assert [(r["name"], r["rows"], r["images"]) for r in reports] == [("RefCOCO_val", 3, 2), ("RefCOCO+_testA", 2, 1)]
    assert len(decoded) == 2
    val, plus = _read(tmp_path, "RefCOCO_val"), _read(tmp_path, "RefCOCO+_testA")
    assert [row["index"] for row in val] == [0, 1, 2]
    assert [row["question"] for row in val] == ["thing 0", "thing 1", "thing 2"]
    assert [row["question"] for row in plus] == ["thing 0", 'the "red" one']
    assert image_cells(val) == [base64.b64decode(PICTURES[n]) for n in (0, 1, 0)]
    assert image_cells(plus) == [base64.b64decode(PICTURES[0])] * 2
    assert val[2]["image_id"] == val[0]["image_id"] != val[1]["image_id"]
    assert ground_truth(val[0]).box == pytest.approx((0.1, 0.1, 0.5, 0.5))


def test_qwen_frame(tmp_path: Path) -> None:
    _convert(tmp_path, ROWS, rule=FrameRule(qwen25=True))
    row = _read(tmp_path, "RefCOCO_val_for_qwen25vl")[0]
    assert (row["answer"], row["answer_width"], row["answer_height"]) == ("[6, 6, 28, 28]", 56, 56)


@pytest.mark.parametrize(
    ("answer", "box"), [("[0.1, 0.1, 0.5, 0.5]", [6.4, 4.8, 32, 24]), ("6 5 32 24", [6, 5, 32, 24])]
)
def test_answers_without_box_columns(answer: str, box: list[float], tmp_path: Path) -> None:
    rows = [
        {k: v for k, v in _row(n, answer=answer).items() if not k.startswith(("bbox", "width", "height"))}
        for n in range(2)
    ]
    _convert(tmp_path, rows)
    truth = ground_truth(_read(tmp_path, "RefCOCO_val")[1])
    assert truth.box == pytest.approx((box[0] / 64, box[1] / 48, box[2] / 64, box[3] / 48))


SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "prompt": ({"question": "Where is <ref>it</ref>?"}, "the question is not the stock prompt"),
    "empty": ({"question": PROMPT.format(" ")}, "the caption is empty"),
    "size": ({"width": 65}, "the image has 64x48 pixels, the row says width 65"),
    "size text": ({"height": "tall"}, "height must hold finite numbers, got 'tall'"),
    "twice": ({"index": 0}, "the index 0 occurs twice in RefCOCO_val"),
    "index": ({"index": "a b"}, "the index 'a b' is empty or holds white space"),
    "box text": ({"bbox_x1": "left"}, "bbox_x1 must hold finite numbers"),
    "box NaN": ({"bbox_x1": "nan"}, "bbox_x1 must hold finite numbers"),
    "box area": ({"bbox_x1": 32}, "has zero area"),
    "box outside": ({"bbox_x2": 99}, "leaves the image of 64x48 pixels"),
    "reference": ({"image": "0"}, "the image cell holds no image"),
    "no base64": ({"image": "?" * 100}, "the image is not base64"),
    "corrupt": ({"image": base64.b64encode(b"x" * 100).decode()}, "the image is corrupt"),
    "category": ({"category": "RefCOCO train"}, "unknown category 'RefCOCO train'"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_bad_rows_stop_or_are_counted(case: str, tmp_path: Path) -> None:
    changes, reason = SPOILED[case]
    rows = [_row(0), _row(1, 1) | changes, _row(2)]
    with pytest.raises(ConversionError, match=rf"row 3 .*{reason}"):
        _convert(tmp_path, rows)
    assert not list((tmp_path / "out").glob("*.tsv"))
    (report,) = _convert(tmp_path, rows, skip_bad=True)
    assert (report["rows"], report["skipped"], report["complete"]) == (2, 1, False)
    assert [row["index"] for row in _read(tmp_path, "RefCOCO_val")] == [0, 2]


def test_mixed_answer_scales_are_not_guessed_through(tmp_path: Path) -> None:
    rows = [{k: v for k, v in _row(n).items() if not k.startswith("bbox")} for n in range(2)]
    rows[1]["answer"] = "[6, 5, 32, 24]"
    with pytest.raises(ConversionError, match="in another scale than the earlier rows"):
        _convert(tmp_path, rows)
    rows[1]["answer"] = "somewhere"
    (tmp_path / "RefCOCO.tsv").unlink()
    with pytest.raises(ConversionError, match="answer must hold finite numbers"):
        _convert(tmp_path, rows)


def test_sizes_are_checked_unless_partial(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _write(tmp_path / "RefCOCO.tsv", ROWS)
    arguments = ["--stock_tsv", str(path), "--output_dir", str(tmp_path / "out")]
    assert main(["refcoco", *arguments]) == 1
    assert "RefCOCO_val 3 instead of 10834" in caplog.text
    assert not list((tmp_path / "out").glob("*.tsv"))
    assert main(["refcoco", *arguments, "--allow-partial"]) == 0
    assert len(list((tmp_path / "out").glob("*.tsv"))) == 2


def test_a_whole_file_is_complete_and_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock_module, "SPLIT_SIZES", dict.fromkeys(SPLIT_SIZES, 2))
    rows = [_row(n, n, split.replace("_", " ")) for split in SPLIT_SIZES for n in range(2)]
    reports = _convert(tmp_path, rows, allow_partial=False)
    assert len(reports) == 8
    assert {report["rows"] for report in reports} == {2}
    monkeypatch.setattr(stock_module, "_rows", lambda path: pytest.fail("read again"))
    again = _convert(tmp_path, rows, allow_partial=False)
    assert sorted(r["md5"] for r in again) == sorted(r["md5"] for r in reports)


def test_an_interrupted_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = stock_module._rows

    def interrupted(path: Path) -> Any:
        for number, row in enumerate(read(path)):
            if number == 4:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(stock_module, "_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _convert(tmp_path, ROWS)
    assert (tmp_path / "out" / ".RefCOCO_val.tsv.part").stat().st_size > 1000
    _convert(tmp_path, ROWS)
    resumed = (tmp_path / "out" / "RefCOCO_val.tsv").read_bytes()
    convert_stock(tmp_path / "RefCOCO.tsv", tmp_path / "fresh", Options(allow_partial=True))
    assert resumed == (tmp_path / "fresh" / "RefCOCO_val.tsv").read_bytes()


def test_other_tables_are_refused(tmp_path: Path) -> None:
    for text, reason in (
        ("", "not a whole TSV"),
        ("a\tb\n1\t2\n", "no column"),
        ("a\tb\n1\t2\n1\t2\t3\n", "not a whole"),
    ):
        (tmp_path / "RefCOCO.tsv").write_text(text)
        with pytest.raises(ConversionError, match=reason):
            convert_stock(tmp_path / "RefCOCO.tsv", tmp_path / "out", Options(allow_partial=True))


def test_existing_files_of_other_inputs_are_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "RefCOCO_val.tsv").write_text("precious")
    with pytest.raises(ConversionError, match="--overwrite replaces it"):
        _convert(tmp_path, ROWS)
    assert (tmp_path / "out" / "RefCOCO_val.tsv").read_text() == "precious"
    _convert(tmp_path, ROWS, overwrite=True)
    assert len(_read(tmp_path, "RefCOCO_val")) == 3
