"""VLMEvalKit's own data set classes, with our reader: nothing is downloaded over a file, and no text is lost.

The classes are not patched; the one that `build_dataset` would take is subclassed. The module imports VLMEvalKit; go
through `ivcp_eval.vlmeval_bridge`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import vlmeval.dataset
from vlmeval.dataset.image_base import ImageBaseDataset
from vlmeval.dataset.video_base import VideoBaseDataset

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import DataMissing
from ivcp_eval.benchmarks.clips import Sampling
from ivcp_eval.files import file_digest
from ivcp_eval.vlmeval_bridge.environment import data_root, fetch
from ivcp_eval.vlmeval_bridge.reading import tsv
from ivcp_eval.vlmeval_bridge.reading.pictures import Unpacking


def build(name: str, sampling: Sampling | None = None) -> Any:
    """The data set object of a VLMEvalKit name or of a TSV in its data root; None if there is neither.

    Args:
        sampling: which frames of its video files are shown, where it is declared.

    Raises:
        DataMissing: not here, and no download possible. tsv.WrongChecksum, tsv.BadTable: a file that is not used.
    """
    cls = next((c for c in vlmeval.dataset.DATASET_CLASSES if name in c.supported_datasets()), None)
    path = data_root() / f"{name}.tsv"
    if cls is None:
        cls = _custom(path) if path.is_file() else None
        return None if cls is None else type(cls.__name__, (_OwnFile, cls), {})(dataset=name)
    if issubclass(cls, VideoBaseDataset) and sampling is not None:
        made = type(cls.__name__, (_StockVideos, cls), {})(dataset=name, nframe=sampling.nframe, fps=sampling.fps or -1)
        made.data = _table(path, expected_md5(name)).assign(index=made.data["index"].to_numpy())
        return made
    if not issubclass(cls, ImageBaseDataset) or issubclass(cls, Unpacking):
        return vlmeval.dataset.build_dataset(name)  # videos and texts, or a class of ours, which reads as this does
    if cls.load_data is not ImageBaseDataset.load_data and path.is_file():
        tsv.read(path)  # a class that may read the file in a way of its own
    return type(cls.__name__, (_StockFile, cls), {})(dataset=name)


def expected_md5(name: str) -> str:
    """The checksum that VLMEvalKit notes for a data set; "" if none."""
    cls = next((c for c in vlmeval.dataset.DATASET_CLASSES if name in c.supported_datasets()), None)
    by_name, of_video = getattr(cls, "DATASET_MD5", {}), ("MP4_MD5", "MD5")
    return str(
        by_name.get(name) or next((getattr(cls, expected) for expected in of_video if hasattr(cls, expected)), "")
    )


class _StockVideos:
    """Stands before a video class of VLMEvalKit's: its table and files lie in the data root; nothing is fetched.

    The class itself would fetch the whole repository, up to hundreds of gigabytes, and run code of its table's cells.
    """

    def prepare_dataset(self, dataset_name: str, *_: Any, **__: Any) -> dict[str, str]:
        """Where the table is, and the folder that its paths of videos count from."""
        path, videos = data_root() / f"{dataset_name}.tsv", data_root() / "videos" / dataset_name
        if not path.is_file() or not videos.is_dir():
            raise DataMissing(f"{path} and the folder {videos} with the videos are expected")
        tsv.read(path, expected_md5(dataset_name))
        return {"root": str(videos), "data_file": str(path)}

    def save_video_frames(self, *_: Any, **__: Any) -> tuple[list[str], list[int], dict[str, float]]:
        """None, and a rate that goes with subtitles: LongVideoBench decodes here, for models that take files too."""
        return [], [], {"fps": 1.0}


class _StockFile(Unpacking):
    """Stands before a class of VLMEvalKit's and reads its file."""

    def prepare_tsv(self, url: str, file_md5: str | None = None) -> pd.DataFrame:
        """The table of ``<data root>/<name>.tsv``, which is fetched if it is not there, and never if it is."""
        path = data_root() / f"{self.dataset_name}.tsv"  # type: ignore[attr-defined]
        self.data_path = str(path)
        if not path.is_file():
            problem = fetch(url, file_md5 or "", path)
            if problem:
                raise DataMissing(problem)
        return _table(path, file_md5 or "")


class _OwnFile(Unpacking):
    """Stands before VLMEvalKit's class for a TSV in the data root that nobody declared."""

    def load_data(self, dataset: str) -> pd.DataFrame:
        """The table, as text throughout."""
        path = data_root() / f"{dataset}.tsv"
        table = tsv.read(path)
        # By its checksum, so that another version of the file never meets stale pictures.
        self.img_root = str(data_root() / "images" / f"{dataset}-{file_digest(path)[:12]}")
        return tsv.typed(table, table.columns)


def _table(path: Path, md5: str) -> pd.DataFrame:
    table = tsv.read(path, md5)
    # What evaluators do with the answers of a set that is not declared we cannot know, so those keep their types.
    declared = path.stem in {benchmarks.load(name).vlmeval for name in benchmarks.names()}
    return tsv.typed(table, tsv.TEXT if declared else tsv.PROSE | {"index", "image", "image_path"})


def _custom(path: Path) -> Any:
    """The class that VLMEvalKit takes for a file of this shape; None for a file that it does not take."""
    columns = tsv.columns(path)
    if "question" not in {column.lower() for column in columns}:
        return None
    if not {"A", "B"} <= set(columns):
        return vlmeval.dataset.CustomVQADataset
    if {"image", "image_path"} & set(columns):
        return vlmeval.dataset.CustomMCQDataset
    return None  # questions without pictures
