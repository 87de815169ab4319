"""Rows that show a video: which columns say so, the part of the prompt that comes of them, and its content hash.

A row has either pictures and ``seconds``, when each of them is shown (and ``geometry``, what it shows in space), or
``video``, the path of a file, with ``nframe`` or ``fps``, and ``frames_sha256`` where it was decoded before (`own`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivcp_eval.benchmarks import clips, geometry
from ivcp_eval.files import file_digest, remembered

Message = list[dict[str, Any]]


def shown(line: Mapping[str, Any], message: Message, sampling: clips.Sampling | None = None) -> Message:
    """The message of a row with its pictures as the frames of a video, or with its video file; others as they are.

    Args:
        sampling: which frames are shown, in place of what the row says.

    Raises:
        ValueError: what the row says of its video cannot be read.
    """
    texts = [part for part in message if part["type"] == "text"]
    part: dict[str, Any]
    if seconds := _cell(line, "seconds"):
        frames = [part["value"] for part in message if part["type"] == "image"]
        at = times(seconds)
        clips.check_times(len(frames), at)
        part = {"type": "video", "value": frames, "seconds": at}
        if packed := _cell(line, "geometry"):
            part["geometry"] = packed
        if sampling:
            places = sampling.places([moment - at[0] for moment in at])
            part |= {"value": [frames[place] for place in places], "seconds": [at[place] for place in places]}
            if "geometry" in part:
                part["geometry"] = geometry.of_frames(part["geometry"], places)
        return [part, *texts]
    if path := _cell(line, "video"):
        if sampling:
            return of_file([{"type": "video", "value": path}, *texts], sampling)
        part = {"type": "video", "value": path}
        for name, kind in (("nframe", int), ("fps", float), ("frames_sha256", str)):
            if cell := _cell(line, name):
                part[name] = kind(cell)
        return [part, *texts]
    return message


def of_file(message: Message, sampling: clips.Sampling) -> Message:
    """The message of a video class of VLMEvalKit's for models that take files, and which frames of the file are shown.

    What it says of roles is left out: its own adapters of the families here put all of it into the user's turn.
    """
    fields = {name: value for name, value in vars(sampling).items() if value}
    return [
        {"type": part["type"], "value": part["value"], **(fields if part["type"] == "video" else {})}
        for part in message
        if part["value"]
    ]


def parts(message: Message) -> list[dict[str, Any]]:
    """The conversation that a session answers."""
    return [{part["type"]: part["value"], **{k: v for k, v in part.items() if k not in _OWN}} for part in message]


_OWN = ("type", "value")


def content(part: Mapping[str, Any]) -> Any:
    """What is hashed of a picture or video: bytes of files, times, and what decides which frames are seen."""
    value = part["value"]
    if part["type"] == "image":
        return file_digest(value)
    if part["type"] != "video":
        return value
    rest = {name: said for name, said in part.items() if name not in _OWN}
    if isinstance(value, list):
        return {"frames": [file_digest(name) for name in value], **rest}
    return {"file": remembered(Path(value), "sha256", file_digest, str), "decoder": clips.decoder(), **rest}


def _cell(line: Mapping[str, Any], name: str) -> str:
    """The text of a cell; "" where there is none, or NaN in its place."""
    cell = line.get(name, "")
    return "" if cell != cell else str(cell)


def times(cell: str) -> list[float]:
    """The numbers of a cell. Raises ValueError where it holds something else."""
    try:
        listed = json.loads(cell)
        if not isinstance(listed, list):
            raise TypeError(type(listed).__name__)
        return [float(at) for at in listed]
    except (ValueError, TypeError) as error:
        raise ValueError(f"seconds must be a list of numbers, got {cell[:80]!r} ({error})") from None
