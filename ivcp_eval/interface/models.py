"""Short model names, their checkpoints, and where the weights are on this machine. No torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivcp_eval.files import DAMAGE, PACKAGE, fingerprint
from ivcp_eval.interface import Checkpoint
from ivcp_eval.interface.registry import adapter, family_names, unknown

#: How weights may be stored when they are loaded, and the library that does so.
QUANTISED = {"int8": "torchao", "int4": "torchao", "bnb8": "bitsandbytes", "bnb4": "bitsandbytes"}
_LOCAL = "MODEL_PATH (--model-path; in a sweep file `models: {{{}: /path/to/folder}}`)"


class MissingWeights(RuntimeError):
    """The weights of a model are not on this machine; the message says how to get them."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint found on disk.

    Attributes:
        checkpoint, family: what it is.
        source: folder with config and weights.
        revision: commit on the hub, or the fingerprint of local files.
        trained: False for random stand-in weights, whose accuracies mean nothing.
        quantised: how weights are stored when they are loaded, of `QUANTISED`; empty: as they are.
    """

    checkpoint: Checkpoint
    family: str
    source: Path
    revision: str
    trained: bool = True
    quantised: str = ""


def checkpoints() -> dict[str, tuple[str, Checkpoint]]:
    """Every short name with its family and checkpoint, in family order."""
    by_name: dict[str, tuple[str, Checkpoint]] = {}
    for family in family_names():
        for checkpoint in adapter(family).checkpoints:
            if checkpoint.name in by_name:
                raise ValueError(f"model {checkpoint.name!r} is declared by {by_name[checkpoint.name][0]} and {family}")
            by_name[checkpoint.name] = (family, checkpoint)
    return by_name


def find(name: str) -> tuple[str, Checkpoint]:
    """(family, checkpoint) of a short name, or of one with quantised weights: ``qwen25@int8``.

    Raises:
        ValueError: unknown name; the message suggests the nearest.
    """
    known, (short, kind) = checkpoints(), unquantised(name)
    if short not in known:
        raise unknown("model", short, known)
    if kind and kind not in QUANTISED:
        raise unknown("kind of weights", kind, QUANTISED)
    return known[short]


def unquantised(name: str) -> tuple[str, str]:
    """``qwen25@int8`` -> ("qwen25", "int8"); the second is empty for weights as they are."""
    short, _, kind = name.partition("@")
    return short, kind


def locate(name: str, path: str | os.PathLike[str] | None = None, offline: bool | None = None) -> Weights:
    """Find (or download, where the hub can be reached) the weights of a model.

    Args:
        name: short name. path: local folder that overrides the checkpoint's hub id.
        offline: never ask the hub; default: as ``HF_HUB_OFFLINE`` says.

    Raises:
        ValueError: unknown name. MissingWeights: nothing usable here; the message says what to do.
    """
    family, checkpoint = find(name)
    if path is None and not checkpoint.local:
        return Weights(checkpoint, family, *_from_hub(checkpoint, offline), quantised=unquantised(name)[1])
    folder = PACKAGE / checkpoint.local if path is None else Path(path).expanduser()
    revision = fingerprint(_checked(folder, name))
    return Weights(checkpoint, family, folder, revision, _is_trained(folder), unquantised(name)[1])


def served(name: str, path: str | os.PathLike[str] | None = None) -> Weights:
    """A model of which nothing need be on this machine, since a server has it; ``path`` may hold its processor.

    Raises:
        ValueError: unknown name.
    """
    family, checkpoint = find(name)
    folder = PACKAGE / checkpoint.local if checkpoint.local else Path(checkpoint.hub)  # which need not be there
    return Weights(checkpoint, family, folder if path is None else Path(path).expanduser(), "")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Have transformers draw no bar while the block runs: it would draw over ours."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _is_trained(folder: Path) -> bool:
    return not (folder / "RANDOM_WEIGHTS").exists()


def _checked(folder: Path, name: str) -> Path:
    if not (folder / "config.json").is_file():
        raise MissingWeights(
            f"model {name!r}: {folder} holds no config.json. Point {_LOCAL.format(name)} at the folder of "
            "a downloaded checkpoint, with config.json, tokenizer and *.safetensors files."
        )
    if not any(folder.glob("*.safetensors")):
        raise MissingWeights(f"model {name!r}: {folder} holds no *.safetensors weights; download the checkpoint whole.")
    for path in sorted(folder.glob("*.json")):
        _check_json(path, name)
    _check_index(folder, name)
    for path in sorted(folder.glob("*.safetensors")):
        _check_safetensors(path, name)
    return folder


def _from_hub(checkpoint: Checkpoint, offline: bool | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        folder = Path(
            snapshot_download(
                checkpoint.hub,
                revision=checkpoint.revision,
                allow_patterns=patterns,
                local_files_only=bool(offline),
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        how = "; a run would download them" if offline else f" and could not be fetched ({type(error).__name__})"
        raise MissingWeights(
            f"model {checkpoint.name!r}: the weights of {checkpoint.hub} (revision {checkpoint.revision}) are not on "
            f"this machine{how}. Run "
            f"`hf download {checkpoint.hub} --revision {checkpoint.revision}` where the hub can be reached, or point "
            f"{_LOCAL.format(checkpoint.name)} at a local copy."
        ) from error
    return _checked(folder, checkpoint.name), folder.name


def _check_safetensors(path: Path, name: str) -> None:
    """Raise MissingWeights if a file is cut short or is none: its header says where its last tensor ends."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"its header has {length} bytes")
            header = json.loads(file.read(length))
        expected = 8 + length + _laid_out({key: entry for key, entry in header.items() if key != "__metadata__"})
    except DAMAGE as error:
        raise MissingWeights(
            f"model {name!r}: {path} is no safetensors file, or damaged ({error}); download it again."
        ) from None
    if size != expected:
        raise MissingWeights(
            f"model {name!r}: {path} has {size} bytes, its header announces {expected}: the download was cut short or "
            "the file is damaged; download it again."
        )


def _laid_out(entries: dict[str, Any]) -> int:
    """Bytes of a safetensors file's tensors; raises ValueError unless each has its size and all lie side by side."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        bits = re.fullmatch(r"BOOL|[A-Z]+(\d+)(_\w+)?", entry["dtype"])
        if start != end or stop < start or bits is None:
            raise ValueError(f"tensor {name!r} lies at {start} to {stop}, of type {entry['dtype']!r}")
        if 8 * (stop - start) != math.prod(entry["shape"]) * int(bits[1] or 8):
            raise ValueError(f"tensor {name!r} of shape {entry['shape']} has {stop - start} bytes")
        end = stop
    return end


def _check_json(path: Path, name: str) -> None:
    """Raise MissingWeights for a configuration or tokenizer that was cut short; libraries do not name it."""
    try:
        if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            raise ValueError("it holds no object")
    except DAMAGE as error:
        raise MissingWeights(f"model {name!r}: {path} is damaged ({error}); download it again.") from None


def _check_index(folder: Path, name: str) -> None:
    """Raise MissingWeights if a part that the index of a split checkpoint names is not there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        parts = sorted({str(part) for part in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except DAMAGE as error:
        raise MissingWeights(f"model {name!r}: {index} is damaged ({error!r}); download it again.") from None
    there = {path.name for path in folder.iterdir()}
    lacking = [part[:80] for part in parts if part not in there]
    if lacking:
        raise MissingWeights(
            f"model {name!r}: {folder} lacks {', '.join(lacking[:5])} of {len(parts)} parts of the weights that "
            f"{index.name} names; download the checkpoint whole."
        )
