"""Depth and camera of every frame of a clip, as one cell of a table: ``geometry``.

The cell is base64 of zlib of a line of JSON and of what follows it: for each view (rows, columns) depths, little-endian
16-bit numbers of millimetres, 0 where there is none. The JSON says ``rows``, ``columns``, ``focal`` (of width and
height), ``poses`` (12 numbers each, (3, 4) row by row) and ``shown``, which view each frame is of.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ivcp_eval.interface import Geometry


def packed(views: Sequence[Geometry], shown: Sequence[int]) -> str:
    """The cell of frames that are ``shown`` of ``views``, all of one size and focal length."""
    head = {
        "rows": views[0].depth.shape[0],
        "columns": views[0].depth.shape[1],
        "focal": list(views[0].focal),
        "poses": [[round(float(number), 6) for number in view.pose.ravel()] for view in views],
        "shown": list(shown),
    }
    return _joined(head, np.stack([np.rint(view.depth * 1000) for view in views]).astype("<u2").tobytes())


def of_frames(cell: str, places: Sequence[int]) -> str:
    """The cell of some of its frames. Raises ValueError as `read`."""
    head, body = _split(cell)
    return _joined({**head, "shown": [head["shown"][place] for place in places]}, body)


def read(cell: str, n_frames: int) -> list[Geometry]:
    """Of every frame of a clip. Raises ValueError: the cell is not what `packed` gives, or of other frames."""
    said, body = _split(cell)
    try:
        poses = np.array(said["poses"], dtype=np.float64).reshape(-1, 3, 4)
        depths = np.frombuffer(body, dtype="<u2").reshape(len(poses), said["rows"], said["columns"]) / 1000
        fx, fy = map(float, said["focal"])
        usable = fx > 0 and fy > 0 and bool(np.isfinite(poses).all())
        usable &= all(isinstance(view, int) and 0 <= view < len(poses) for view in said["shown"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"geometry does not hold the depth and poses of views ({error}): {str(said)[:80]}") from error
    if not usable or len(said["shown"]) != n_frames:
        raise ValueError(
            f"geometry shows the views {said['shown'][:8]} of {len(poses)} in {n_frames} frames, with focal lengths "
            f"{said['focal']}; name a view for each frame, finite poses, and focal lengths above 0"
        )
    made = [Geometry(depth.astype(np.float32), pose, (fx, fy)) for depth, pose in zip(depths, poses, strict=True)]
    return [made[view] for view in said["shown"]]


def _joined(head: dict[str, Any], body: bytes) -> str:
    return base64.b64encode(zlib.compress(json.dumps(head).encode() + b"\n" + body, 9)).decode()


def _split(cell: str) -> tuple[dict[str, Any], bytes]:
    try:
        head, _, body = zlib.decompress(base64.b64decode(cell, validate=True)).partition(b"\n")
        said = json.loads(head)
        if not isinstance(said, dict) or not isinstance(said.get("shown"), list):
            raise TypeError("it says not which views are shown")
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"geometry is not base64 of packed depth and poses ({error}): {cell[:40]!r}") from error
    return said, body
