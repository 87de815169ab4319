"""Video files for tests, whose frames say which they are."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

STEP = 12  # of grey between two frames: more than a lossy codec changes


def video(
    path: Path,
    seconds: Sequence[float],
    size: tuple[int, int] = (64, 48),
    codec: str = "mpeg4",
    options: dict[str, str] | None = None,
    coding: dict[str, str] | None = None,
) -> Path:
    """A file with a frame at each of ``seconds``, grey with the level 12 x (its number, modulo 20).

    Args:
        options: of the container. coding: of the codec.
    """
    width, height = size
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=10 if path.suffix == ".avi" else 1000)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = coding or {}
        stream.codec_context.time_base = Fraction(1, 10 if path.suffix == ".avi" else 1000)
        container.start_encoding()
        for i, at in enumerate(seconds):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), STEP * (i % 20), np.uint8), format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = round(at / frame.time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def levels(frames: Any) -> list[int]:
    """Which frames of `video` these are, modulo 20."""
    return [round(float(frame.mean()) / STEP) for frame in frames]


def sound(path: Path) -> Path:
    """A file with a tenth of a second of silence."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
