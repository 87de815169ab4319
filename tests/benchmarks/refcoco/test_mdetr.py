"""Reading MDETR files: what is accepted, and a clear reason for everything that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ivcp_eval.benchmarks.refcoco.mdetr import read_mdetr
from ivcp_eval.benchmarks.refcoco.records import BadRecord, ConversionError, FrameRule, Record, clean_caption
from ivcp_eval.benchmarks.refcoco.splits import SPLIT_SIZES, split_of_annotation_file, split_of_category
from tests.benchmarks.refcoco.data import Corpus


def test_a_sound_file(tmp_path: Path) -> None:
    content = read_mdetr(Corpus(tmp_path).save())
    assert (content.entries, content.problems, content.dataset_names) == (6, (), frozenset({"refcoco"}))
    assert content.records[4] == Record(
        where="images[4]", index="1004", image_id="COCO_train2014_000000000001.jpg", question="thing 4",
        box=(4, 2.5, 24.25, 12.5), width=64, height=48, object_id="1504",
    )  # fmt: skip


SPOILED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "empty caption": ({"caption": " \t"}, {}, "the caption is empty"),
    "caption no text": ({"caption": 5}, {}, "the caption must be text, got 5"),
    "no caption": ({"caption": ...}, {}, "the caption is missing"),
    "absolute file name": ({"file_name": "/etc/passwd"}, {}, "leaves the images folder"),
    "file name climbs": ({"file_name": "a/../../b.jpg"}, {}, "leaves the images folder"),
    "file name is the folder": ({"file_name": "."}, {}, "leaves the images folder"),
    "file name with backslash": ({"file_name": "..\\b.jpg"}, {}, "backslash or a control character"),
    "file name no text": ({"file_name": None}, {}, "file_name must be text"),
    "width zero": ({"width": 0}, {}, "width must be a whole number of pixels"),
    "height text": ({"height": "48"}, {}, "height must be a whole number of pixels"),
    "width absurd": ({"width": 10**400}, {}, "width must be a whole number of pixels"),
    "id text": ({"id": "x"}, {}, "the id must be a whole number"),
    "zero area": ({}, {"bbox": [1, 1, 0, 5]}, "has zero area"),
    "negative area": ({}, {"bbox": [10, 10, -5, 5]}, "has zero area"),
    "right of the image": ({}, {"bbox": [60, 1, 10, 5]}, "leaves the image of 64x48 pixels"),
    "above the image": ({}, {"bbox": [1, -4, 10, 5]}, "leaves the image of 64x48 pixels"),
    "three numbers": ({}, {"bbox": [1, 2, 3]}, r"must be \[x, y, width, height\]"),
    "no bbox": ({}, {"bbox": ...}, r"must be \[x, y, width, height\]"),
    "text in bbox": ({}, {"bbox": [1, 2, "3", 4]}, "finite numbers, got '3'"),
    "NaN in bbox": ({}, {"bbox": [1, 2, float("nan"), 4]}, "finite numbers, got nan"),
    "huge number in bbox": ({}, {"bbox": [1, 2, 10**400, 4]}, "finite numbers, got 10000"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_one_bad_entry_is_named_and_the_others_survive(case: str, tmp_path: Path) -> None:
    image_changes, annotation_changes, reason = SPOILED[case]
    corpus = Corpus(tmp_path)
    for entry, changes in ((corpus.images[3], image_changes), (corpus.annotations[3], annotation_changes)):
        for key, value in changes.items():
            entry[key] = value
            if value is ...:
                del entry[key]
    content = read_mdetr(corpus.save())
    assert [r.where for r in content.records] == ["images[0]", "images[1]", "images[2]", "images[4]", "images[5]"]
    problem = content.problems[-1]
    assert problem.where == "images[3]"
    with pytest.raises(ConversionError, match=reason):
        raise ConversionError.of_problems("x", [problem])


def test_duplicate_ids_reject_all_their_users(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    corpus.images[1]["id"] = corpus.images[0]["id"]
    corpus.annotations[4]["id"] = corpus.annotations[5]["id"]
    content = read_mdetr(corpus.save())
    assert [r.where for r in content.records] == ["images[2]", "images[3]"]
    reasons = {p.where: p.reason for p in content.problems}
    assert reasons["images[0]"] == reasons["images[1]"] == "the id is used by 2 entries"
    assert reasons["images[4]"] == reasons["images[5]"] == "its annotation's id 5 is used by 2 annotations"
    assert reasons["annotations[1]"] == "its image_id 1001 is the id of no entry of 'images'"


@pytest.mark.parametrize(("keep", "count"), [(0, 0), (2, 2)])
def test_an_expression_has_exactly_one_annotation(keep: int, count: int, tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    annotation = corpus.annotations.pop(2)
    corpus.annotations += [{**annotation, "id": 100 + n} for n in range(keep)]
    (problem,) = read_mdetr(corpus.save()).problems
    assert (problem.where, problem.index) == ("images[2]", "1002")
    assert problem.reason.endswith(f"this one has {count}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("\ufeff{}", "is not JSON"),
        ("[1, 2]", "holds a list; expected MDETR's layout"),
        ("{}", "has no list 'images'"),
        ('{"images": {}, "annotations": []}', "has no list 'images'"),
        ('{"images": [{"caption": "a"}]}', "has no list 'annotations'"),
        ('{"images": [], "annotations": []}', "'images' is empty"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}', "plain COCO file"),
        ("[" * 100_000, "is not JSON"),
        ('{"images": [' + "9" * 5000 + "]}", "is not JSON"),
    ],
)
def test_other_files_are_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "finetune_refcoco_val.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConversionError, match=reason):
        read_mdetr(path)


def test_boxes_on_the_border_may_overshoot_by_a_pixel(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    corpus.annotations[0]["bbox"] = [-0.5, 0, 65, 48.9]
    content = read_mdetr(corpus.save())
    assert content.problems == ()
    assert content.records[0].box == (-0.5, 0, 64.5, 48.9)


def test_captions_survive_the_table(tmp_path: Path) -> None:
    from pandas._libs.parsers import STR_NA_VALUES

    captions = [
        *sorted(STR_NA_VALUES - {""}),
        'say "cheese"',
        '"quoted"',
        "tab\there\r\nline",
        "naïve é",
        "1.50",
        "'",
        "#",
    ]
    rows = [
        f"{i}\t" + ('"' + c.replace('"', '""') + '"' if '"' in c else c)
        for i, c in enumerate(map(clean_caption, captions))
    ]
    path = tmp_path / "a.tsv"
    path.write_text("index\tquestion\n" + "\n".join(rows) + "\n", encoding="utf-8")
    read = pd.read_csv(path, sep="\t")["question"].tolist()
    assert [text.strip() for text in read] == [c.replace("\t", " ").replace("\r\n", " ") for c in captions]
    with pytest.raises(BadRecord):
        clean_caption("")


def _released_rule(bbox: list[float], width: int, height: int, patch: int = 28) -> list[int]:
    """What the released converter computes, written from its description: round sides, scale, round."""
    scale_x, scale_y = round(width / patch) * patch / width, round(height / patch) * patch / height
    x, y, w, h = bbox
    return [round(x * scale_x), round(y * scale_y), round((x + w) * scale_x), round((y + h) * scale_y)]


def test_qwen25_answers_equal_the_released_rule_on_ordinary_images() -> None:
    rule = FrameRule(qwen25=True)
    for width in range(80, 700, 13):
        for height in range(80, 700, 17):
            bbox = [width * 0.1 + 0.37, height * 0.2 + 0.11, width * 0.5 + 0.5, height * 0.55 + 0.49]
            box = (bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3])
            record = Record("", "1", "a.jpg", "q", box, width, height, "")
            assert not rule.departs_from_released(width, height)
            answer, frame = rule.answer(record)
            assert answer == _released_rule(bbox, width, height)
            assert all(isinstance(value, int) for value in answer)
            assert (frame[0] % 28, frame[1] % 28) == (0, 0)


def test_qwen25_follows_the_real_processor_where_the_released_rule_does_not() -> None:
    rule = FrameRule(qwen25=True, max_pixels=100 * 28 * 28)
    small = Record("", "1", "a.jpg", "q", (4, 4, 16, 16), 20, 20, "")
    assert rule.answer(small) == ([11, 11, 45, 45], (56, 56))
    large = Record("", "1", "a.jpg", "q", (0, 0, 640, 480), 640, 480, "")
    assert rule.answer(large) == ([0, 0, 308, 224], (308, 224))
    assert rule.departs_from_released(20, 20)
    assert rule.departs_from_released(640, 480)
    assert not FrameRule(qwen25=True).departs_from_released(640, 480)
    assert not FrameRule().departs_from_released(20, 20)
    with pytest.raises(BadRecord, match="aspect ratio"):
        rule.frame(10, 3000)
    with pytest.raises(BadRecord, match="no area left in the resized frame"):
        rule.answer(Record("", "1", "a.jpg", "q", (100.1, 5, 100.3, 50), 640, 480, ""))
    with pytest.raises(ValueError, match="must be positive"):
        FrameRule(patch_size=0)


def test_names_of_the_eight_splits() -> None:
    assert sum(SPLIT_SIZES.values()) == 57457
    for dataset in ("RefCOCO", "RefCOCO+", "RefCOCOg"):
        for split in ("val", "test") if dataset == "RefCOCOg" else ("val", "testA", "testB"):
            assert split_of_annotation_file(f"finetune_{dataset.lower()}_{split}") == f"{dataset}_{split}"
            assert split_of_category(f"{dataset} {split}") == f"{dataset}_{split}"
            assert split_of_category(f" {dataset}_{split.lower()}") == f"{dataset}_{split}"
    assert split_of_annotation_file("finetune_refcoco_train") is None
    assert split_of_category("RefCOCO") is None
    assert json.dumps(SPLIT_SIZES)  # plain data
