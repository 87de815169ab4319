"""The eight referring-expression test sets and how files and categories name them."""

from __future__ import annotations

import re

__all__ = ["SPLIT_SIZES", "dataset_of_split", "split_of_annotation_file", "split_of_category"]

# Expressions per split in MDETR's finetune_*.json (UNC splits of RefCOCO and RefCOCO+, UMD split of RefCOCOg).
SPLIT_SIZES: dict[str, int] = {
    "RefCOCO_val": 10834,
    "RefCOCO_testA": 5657,
    "RefCOCO_testB": 5095,
    "RefCOCO+_val": 10758,
    "RefCOCO+_testA": 5726,
    "RefCOCO+_testB": 4889,
    "RefCOCOg_val": 4896,
    "RefCOCOg_test": 9602,
}

_BY_LOWER_CASE = {name.lower(): name for name in SPLIT_SIZES}


def split_of_annotation_file(stem: str) -> str | None:
    """``finetune_refcoco+_testA`` -> ``RefCOCO+_testA``; ``None`` if it is none of the eight."""
    return _BY_LOWER_CASE.get(stem.lower().removeprefix("finetune_"))


def split_of_category(category: str) -> str | None:
    """``RefCOCO+ testA`` (VLMEvalKit's stock spelling, any separator) -> ``RefCOCO+_testA``; else ``None``."""
    return _BY_LOWER_CASE.get(re.sub(r"[\s_-]+", "_", category.strip().lower()))


def dataset_of_split(split: str) -> str:
    """``RefCOCO+_testA`` -> ``refcoco+``, the ``dataset_name`` in MDETR's files."""
    return split.rsplit("_", 1)[0].lower()
