"""Small MDETR files and pictures for the converter's tests."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from ivcp_eval.benchmarks.refcoco import convert as convert_module
from ivcp_eval.benchmarks.refcoco.convert import convert_mdetr
from ivcp_eval.benchmarks.refcoco.images import encode_file
from ivcp_eval.benchmarks.refcoco.writer import Options


def picture(width: int = 64, height: int = 48, seed: int = 0, kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """A noisy picture: different seeds give different bytes."""
    buffer = io.BytesIO()
    noise = random.Random(seed).randbytes(8 * 6 * 3)
    image = Image.frombytes("RGB", (8, 6), noise).resize((width, height)).convert(mode)
    image.save(buffer, kind)
    return buffer.getvalue()


class Corpus:
    """``images`` pictures of 64x48 pixels with ``per_image`` expressions each, to be spoiled by a test."""

    def __init__(self, folder: Path, images: int = 3, per_image: int = 2, name: str = "finetune_refcoco_val") -> None:
        self.folder, self.pictures, self.output = folder, folder / "train2014", folder / "out"
        self.pictures.mkdir(parents=True)
        self.path = folder / f"{name}.json"
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        for number in range(images):
            (self.pictures / self.file_name(number)).write_bytes(picture(seed=number))
        # Expressions of one picture are not neighbours: the order of the file must survive all the same.
        for index in range(images * per_image):
            self.add(1000 + index, self.file_name(index % images), f"thing {index}", [index, 2.5, 20.25, 10])

    @staticmethod
    def file_name(number: int) -> str:
        return f"COCO_train2014_{number:012d}.jpg"

    def add(self, index: int, file_name: str, caption: str, bbox: Sequence[float], size: tuple[int, int] = (64, 48)):
        entry = {"id": index, "file_name": file_name, "width": size[0], "height": size[1], "caption": caption}
        self.images.append({**entry, "dataset_name": "refcoco", "original_id": 7, "tokens_negative": [[0, 3]]})
        annotation = {"id": len(self.annotations), "image_id": index, "bbox": list(bbox), "category_id": 1}
        self.annotations.append({**annotation, "area": 12.5, "iscrowd": 0, "original_id": 500 + index})

    def save(self) -> Path:
        content = {"info": {}, "licenses": [], "images": self.images, "annotations": self.annotations, "categories": []}
        self.path.write_text(json.dumps(content), encoding="utf-8")
        return self.path


def image_cells(rows: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Every row's image bytes, following references as VLMEvalKit's ImageBaseDataset.__init__ does."""
    cells = {str(row["index"]): str(row["image"]) for row in rows}
    resolved = []
    for row in rows:
        cell = cells[str(row["index"])]
        if len(cell) <= 64:
            cell = cells[cell]
            assert len(cell) > 64, "a reference must lead to an image"
        resolved.append(base64.b64decode(cell, validate=True))
    return resolved


def options(**changes: Any) -> Options:
    return Options(**({"allow_partial": True, "workers": 1} | changes))


def convert(corpus: Corpus, **changes: Any) -> dict[str, Any]:
    return convert_mdetr(corpus.save(), corpus.pictures, corpus.output, options(**changes))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return pd.read_csv(path, sep="\t").to_dict("records")  # exactly how VLMEvalKit loads a TSV


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures, in the order in which the converter will read them."""
    read: list[str] = []

    def counting(path: Path) -> Any:
        read.append(path.name)
        return encode_file(path)

    monkeypatch.setattr(convert_module, "encode_file", counting)
    return read


def truncate(path: Path) -> None:
    """Cut a picture short."""
    path.write_bytes(path.read_bytes()[:-40])
