"""Decoded videos as parts of a conversation, ``{"video": frames, "seconds": times}``: what processors want of them.

Processors guess a rate where none is given (24 frames a second), and sample frames again if they are not told that the
frames are sampled; either would make every time wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ivcp_eval.interface import Frame

Parts = Sequence[Mapping[str, Any]]


def frames_per_step(processor: Any) -> int:
    """Frames that the tower joins."""
    return int(getattr(getattr(processor, "video_processor", None), "temporal_patch_size", None) or 1)


def video_options(processor: Any, conversations: Sequence[Parts]) -> dict[str, Any]:
    """Arguments of the processor's call for the videos of all conversations; empty where there are none.

    A video too short for one step of the tower is shown as if its last frame went on.

    Raises:
        ValueError: a video without frames, with frames of several sizes, or whose times are not one for each frame,
            increasing from 0 or later.
    """
    videos = [part for parts in conversations for part in parts if "video" in part]
    if not videos:
        return {}
    pixels, metadata = [], []
    for part in videos:
        frames, seconds = _pixels(part["video"]), _seconds(part)
        missing = max(0, frames_per_step(processor) - len(seconds))
        pixels.append(np.concatenate((frames, frames[-1:].repeat(missing, axis=0))))
        metadata.append(_metadata(seconds, missing))
    return {"videos": pixels, "videos_kwargs": {"video_metadata": metadata, "do_sample_frames": False}}


def frames_in(processor: Any, parts: Parts) -> list[Frame | None]:
    """What each image of a prompt shows, for `prune`: a picture, or a grid step of a video."""
    found: list[Frame | None] = []
    clip = 0
    for part in parts:
        if "image" in part:
            found.append(None)
        if "video" in part:
            joined = frames_per_step(processor)
            found += [
                Frame(
                    clip,
                    index,
                    at,
                    _motion(part, slice(index * joined, (index + 1) * joined)),
                    part["geometry"][index * joined] if "geometry" in part else None,
                )
                for index, at in enumerate(_seconds(part)[::joined])
            ]
            clip += 1
    return found


def _motion(part: Mapping[str, Any], frames: slice) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """The farthest that each cell moved in one of the frames."""
    return part["motion"][frames].max(axis=0) if "motion" in part else None


def _pixels(frames: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(T, H, W, 3) uint8 of PIL images, or of such an array."""
    if not len(frames):
        raise ValueError("got a video without frames; decode at least one")
    if isinstance(frames, np.ndarray):
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"got frames {frames.shape} of {frames.dtype}, expected (T, H, W, 3) of uint8")
        return frames
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"the frames of a video have the sizes {sorted(sizes)}; resize them to one")
    return np.stack([np.asarray(frame.convert("RGB")) for frame in frames])


def _seconds(part: Mapping[str, Any]) -> list[float]:
    """When each frame is shown."""
    seconds = [float(at) for at in part.get("seconds", ())]
    if len(seconds) != len(part["video"]):
        raise ValueError(
            f"got {len(seconds)} times for a video of {len(part['video'])} frames; say when each is shown, "
            '{"video": frames, "seconds": [0.0, 0.5, ...]}'
        )
    inside = all(math.isfinite(at) and at >= 0 for at in seconds)
    if not inside or any(later <= at for at, later in pairwise(seconds)):
        raise ValueError(f"the times of a video's frames must increase from 0 or later, got {seconds[:8]}")
    return seconds


def _metadata(seconds: list[float], missing: int) -> dict[str, Any]:
    """Such that `VideoMetadata` gives back the times, and their mean rate as the rate of sampling.

    A single frame has no rate; it counts as one a second.
    """
    n = len(seconds)
    rate = (n - 1) / (seconds[-1] - seconds[0]) if n > 1 else 1.0
    shown = [at * rate for at in (*seconds, *seconds[-1:] * missing)]
    return {"total_num_frames": len(shown), "fps": rate, "frames_indices": shown}
