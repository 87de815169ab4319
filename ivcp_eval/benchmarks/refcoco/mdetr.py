"""Reading MDETR's ``finetune_*.json``: COCO-like JSON with one ``images`` entry per referring expression.

Layout (ashkamath/mdetr@8cbe208, scripts/fine-tuning/refexp_coco_format.py): ``images`` = ``{id, file_name, height,
width, caption, dataset_name, original_id, ...}``, ``annotations`` = ``{id, image_id, bbox: [x, y, w, h],
original_id, ...}``; exactly one annotation per entry, and entries of one picture share their ``file_name``.
"""

from __future__ import annotations

import json
import posixpath
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivcp_eval.benchmarks.refcoco.records import (
    BadRecord,
    ConversionError,
    Problem,
    Record,
    check_box,
    clean_caption,
    finite_number,
)

__all__ = ["MdetrFile", "read_mdetr"]

_MAX_SIDE = 65_535  # of a JPEG


@dataclass(frozen=True)
class MdetrFile:
    """Contents of one annotation file: usable records in file order, problems, number of ``images`` entries."""

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    entries: int
    dataset_names: frozenset[str]


def read_mdetr(path: Path) -> MdetrFile:
    """Read and check one annotation file (not the pictures).

    Raises:
        FileNotFoundError: there is no such file.
        ConversionError: the file is not JSON or not in MDETR's layout at all. Single bad entries are not raised but
            returned as problems.
    """
    images, annotations = _load(path)
    problems: list[Problem] = []
    counts = Counter(_id_text(entry) for entry in images)
    annotation_counts = Counter(_id_text(annotation) for annotation in annotations)
    by_image = _annotations_by_image(counts, annotations, problems)
    records: list[Record] = []
    for position, entry in enumerate(images):
        where, index = f"images[{position}]", _id_text(entry)
        try:
            if counts[index] > 1 and not index.startswith("invalid:"):
                raise BadRecord(f"the id is used by {counts[index]} entries")
            records.append(_record(where, entry, by_image.get(index, []), annotation_counts))
        except BadRecord as error:
            name = str(entry.get("file_name", "?")) if isinstance(entry, Mapping) else "?"
            problems.append(Problem(where, index, name, str(error)))
    names = {str(entry["dataset_name"]) for entry in images if isinstance(entry, Mapping) and "dataset_name" in entry}
    return MdetrFile(tuple(records), tuple(problems), len(images), frozenset(names))


def _load(path: Path) -> tuple[list[Any], list[Any]]:
    expected = "expected MDETR's layout: an object with the lists 'images' (with captions) and 'annotations'"
    try:
        with path.open(encoding="utf-8") as stream:
            content = json.load(stream)
    except (ValueError, RecursionError) as error:  # ValueError: syntax, bad UTF-8, numbers of 4300 digits
        raise ConversionError(f"{path} is not JSON ({error}); {expected}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}; {expected}")
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise ConversionError(f"{path} has no list {key!r}, only {sorted(content)[:10]}; {expected}")
    images, annotations = content["images"], content["annotations"]
    if not images:
        raise ConversionError(f"{path}: 'images' is empty; {expected}")
    if not any(isinstance(entry, dict) and "caption" in entry for entry in images):
        raise ConversionError(f"{path}: no entry of 'images' has a 'caption' (plain COCO file?); {expected}")
    return images, annotations


def _id_text(entry: Any) -> str:
    value = entry.get("id") if isinstance(entry, Mapping) else None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else f"invalid:{value!r}"


def _annotations_by_image(
    known: Container[str], annotations: Sequence[Any], problems: list[Problem]
) -> dict[str, list[Mapping[str, Any]]]:
    """Annotations per image id; those that belong nowhere are problems of their own."""
    by_image: dict[str, list[Mapping[str, Any]]] = {}
    for position, annotation in enumerate(annotations):
        owner = str(annotation.get("image_id")) if isinstance(annotation, Mapping) else "?"
        if isinstance(annotation, Mapping) and owner in known:
            by_image.setdefault(owner, []).append(annotation)
        else:
            reason = f"its image_id {owner} is the id of no entry of 'images'"
            problems.append(Problem(f"annotations[{position}]", _id_text(annotation), "?", reason))
    return by_image


def _record(
    where: str, entry: Any, annotations: Sequence[Mapping[str, Any]], annotation_counts: Mapping[str, int]
) -> Record:
    if not isinstance(entry, Mapping):
        raise BadRecord(f"the entry must be an object, got {type(entry).__name__}")
    index = _id_text(entry)
    if index.startswith("invalid:"):
        raise BadRecord(f"the id must be a whole number, got {entry.get('id')!r}")
    width, height = (_side(entry, key) for key in ("width", "height"))
    image_id = _file_name(entry.get("file_name"))
    if "caption" not in entry:
        raise BadRecord("the caption is missing")
    question = clean_caption(entry["caption"])
    if len(annotations) != 1:
        raise BadRecord(f"a referring expression has exactly one annotation, this one has {len(annotations)}")
    annotation = annotations[0]
    uses = annotation_counts[_id_text(annotation)]
    if uses > 1:
        raise BadRecord(f"its annotation's id {annotation.get('id')} is used by {uses} annotations")
    bbox = annotation.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise BadRecord(f"the bbox must be [x, y, width, height], got {bbox!r}")
    x, y, w, h = (finite_number(value, "the bbox") for value in bbox)
    box = check_box(x, y, x + w, y + h, width, height)
    object_id = annotation.get("original_id")
    object_text = str(object_id) if isinstance(object_id, int) else ""
    return Record(where, index, image_id, question, box, width, height, object_text)


def _side(entry: Mapping[str, Any], key: str) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_SIDE:
        raise BadRecord(f"{key} must be a whole number of pixels from 1 to {_MAX_SIDE}, got {value!r}")
    return value


def _file_name(name: Any) -> str:
    """The name relative to the images folder; annotation files come from elsewhere and are not trusted."""
    if not isinstance(name, str) or not name.strip():
        raise BadRecord(f"file_name must be text, got {name!r}")
    if any(character in name for character in "\\\x00\t\r\n"):
        raise BadRecord(f"file_name {name!r} holds a backslash or a control character")
    normal = posixpath.normpath(name)
    if posixpath.isabs(name) or normal in (".", "..") or normal.startswith("../"):
        raise BadRecord(f"file_name {name!r} leaves the images folder")
    return normal
