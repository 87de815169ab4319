"""How far the blocks of a video move, as its encoded stream says (FFmpeg exports the motion vectors of its codecs)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CELL = 8  # pixels along a side
POINTS = 5  # along each side of a block, at which its vector is looked at; blocks have at most 16 pixels


class Motion:
    """Takes the frames of a stream that exports its vectors, in the order in which they are shown.

    Attributes:
        steps: for each frame that is shown (rows, columns) float32, cells of `CELL` pixels: the longest vector since
            the one before, in pixels. Infinite in the first, in one that refers to no other, and where no block does.
        found: whether any frame has vectors.
    """

    def __init__(self) -> None:
        self.steps: list[NDArray[np.float32]] = []
        self.found = False
        self._since: NDArray[np.float32] | None = None

    @staticmethod
    def exported(codec: Any) -> None:
        """Have a stream's decoder, before its first frame, export what it can."""
        codec.options = {**codec.options, "flags2": "+export_mvs"}

    def see(self, frame: Any, shown: bool) -> None:
        """One frame; the next one counts from here if it is ``shown``."""
        vectors, size = frame.side_data.get("MOTION_VECTORS"), (frame.height, frame.width)
        now = cells_of(size) if self._since is None else self._since
        if vectors is not None:
            now, self.found = np.maximum(now, block_motion(vectors.to_ndarray(), size)), True
        self._since = None if shown else now
        if shown:
            new = not self.steps or vectors is None
            turned = np.full_like(now, np.inf) if new else now
            self.steps.append(np.ascontiguousarray(np.rot90(turned, frame.rotation // 90)))


def of_frames(av: Any, frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(T, rows, columns) as `Motion.steps`, of frames (T, H, W, 3) that are encoded here, as MPEG-4.

    For pictures, and for files of codecs that export no vectors. What the encoder finds new is so coded, nothing else.
    """
    height, width = (side - side % 2 for side in frames.shape[1:3])  # the codec's pixels of colour are two wide
    encoder, decoder = av.CodecContext.create("mpeg4", "w"), av.CodecContext.create("mpeg4", "r")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.framerate = width, height, "yuv420p", 1
    encoder.options = {"g": "600", "bf": "0", "qmin": "2", "qmax": "2"}
    Motion.exported(decoder)
    motion = Motion()
    pictures = (np.ascontiguousarray(frame[:height, :width]) for frame in frames)
    stream = [av.VideoFrame.from_ndarray(picture, format="rgb24") for picture in pictures]
    for number, frame in enumerate([*stream, None]):
        if frame is not None:
            frame.pts = number
        for packet in encoder.encode(frame):
            for again in decoder.decode(packet):
                motion.see(again, True)
    for again in decoder.decode(None):
        motion.see(again, True)
    return np.stack(motion.steps)


def cells_of(size: tuple[int, int]) -> NDArray[np.float32]:
    """(rows, columns) of zeros for a frame of (height, width) pixels."""
    return np.zeros([-(-side // CELL) for side in size], np.float32)


def block_motion(vectors: Any, size: tuple[int, int]) -> NDArray[np.float32]:
    """(rows, columns) the longest of a frame's motion vectors in each cell, in pixels; infinite where none reaches.

    Args:
        vectors: structured array, as FFmpeg exports: middle ``dst_x``, ``dst_y`` and size ``w``, ``h`` of each block,
            ``motion_x``, ``motion_y`` in parts of a pixel, ``motion_scale`` of them. size: height, width in pixels.
    """
    found = cells_of(size) - 1
    part = {name: vectors[name].astype(np.float32) for name in vectors.dtype.names}
    length = np.hypot(part["motion_x"], part["motion_y"]) / part["motion_scale"].clip(1)
    offsets = (np.arange(POINTS, dtype=np.float32) + 0.5) / POINTS - 0.5
    ends = []
    for middle, side, pixels, cells in zip(("dst_y", "dst_x"), "hw", size, found.shape, strict=True):
        at = part[middle][:, None] + offsets * part[side][:, None]
        ends.append(np.floor(at * (cells / pixels)).astype(np.int64).clip(0, cells - 1))
    np.maximum.at(found, (ends[0][:, :, None], ends[1][:, None, :]), length[:, None, None])
    return np.where(found < 0, np.float32(np.inf), found)
