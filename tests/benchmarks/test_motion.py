"""Vectors of clips that are encoded here, with a square that moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from ivcp_eval.benchmarks import clips
from ivcp_eval.benchmarks.motion import CELL, block_motion, of_frames


def pictures(frames: int) -> NDArray[Any]:
    """A texture that stands still, and in it a square of another that moves by 4 pixels a frame to the right."""
    random = np.random.default_rng(0)
    ground, square = (random.integers(0, 256, (n, m)).astype("uint8") for n, m in ((16, 24), (4, 4)))
    ground, square = (np.kron(one, np.ones((8, 8), "uint8")) for one in (ground, square))
    shown = []
    for number in range(frames):
        shown.append(ground.copy())
        shown[-1][48:80, 16 + 4 * number : 48 + 4 * number] = square
    return np.stack([np.stack(shown)] * 3, axis=-1)


def encoded(file: Path, frames: int = 9, codec: str = "mpeg4", group: int = 12) -> Path:
    with av.open(str(file), "w") as container:
        stream: Any = container.add_stream(codec, rate=8, options={"g": str(group), "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 192, 128, "yuv420p", 4_000_000
        for picture in pictures(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file


def motion_of(path: Path, **part: object) -> NDArray[Any]:
    found: NDArray[Any] = clips.opened({"video": str(path), "nframe": 20, **part}, moving=True)["motion"]
    return found


@pytest.mark.parametrize("source", ["mpeg4", "libx264", "libvpx-vp9", "pictures"])
def test_vectors(source: str, tmp_path: Path) -> None:
    """Where the square is, its cells moved by 4 pixels a frame; elsewhere nothing does.

    VP9's vectors are not exported, so its frames are encoded again, as pictures are.
    """
    if source == "pictures":
        got = of_frames(av, pictures(9))
    else:
        got = motion_of(encoded(tmp_path / "clip.mp4", codec=source))
    assert got.shape == (9, 128 // CELL, 192 // CELL)
    assert np.isinf(got[0]).all()
    for step in range(1, 9):
        moved = got[step] > 2
        left = 16 + 4 * step
        inside = range(-(-left // CELL), (left + 32) // CELL)  # whole columns of cells in the square
        assert moved[6:10, list(inside)].mean() > 0.6
        assert not moved[:4].any()
        assert not moved[12:].any()
        assert not moved[:, 16:].any()


def test_motion_since_the_frame_that_was_shown_before(tmp_path: Path) -> None:
    """Of three of nine frames, each with the longest vector of those between."""
    path = encoded(tmp_path / "clip.mp4")
    every, some = motion_of(path), motion_of(path, nframe=2)
    places = clips.Sampling(nframe=2).places([i / 8 for i in range(9)])
    assert places == [3, 6]
    assert np.isinf(some[0]).all()
    np.testing.assert_array_equal(some[1], every[4:7].max(axis=0))


def test_a_frame_that_refers_to_no_other_is_new(tmp_path: Path) -> None:
    got = motion_of(encoded(tmp_path / "clip.mp4", group=4))
    assert [bool(np.isinf(step).all()) for step in got] == [i % 4 == 0 for i in range(9)]


def test_a_file_is_decoded_as_it_is_without(tmp_path: Path) -> None:
    path = {"video": str(encoded(tmp_path / "clip.mp4")), "nframe": 3}
    plain, moving = clips.opened(path), clips.opened(path, moving=True)
    assert plain.keys() == {"video", "seconds"}
    assert (plain["video"] == moving["video"]).all()
    assert plain["seconds"] == moving["seconds"]


@pytest.mark.parametrize("size", [(17, 31), (8, 8), (16, 16)])
def test_frames_of_any_size(size: tuple[int, int]) -> None:
    """The codec's are of even sides; a row and column more or less is of no block."""
    frames = np.zeros((3, *size, 3), np.uint8)
    got = of_frames(av, frames)
    assert got.shape == (3, -(-(size[0] // 2 * 2) // CELL), -(-(size[1] // 2 * 2) // CELL))
    assert not got[1:].any()


def test_blocks() -> None:
    names = ("dst_x", "dst_y", "w", "h", "motion_x", "motion_y", "motion_scale")
    rows = [(4, 4, 8, 8, 12, 16, 4), (12, 4, 8, 8, 0, 0, 4), (8, 12, 16, 8, 4, 0, 4)]
    vectors = np.array(rows, dtype=[(name, "i4") for name in names])
    got = block_motion(vectors, (16, 24))
    assert got.tolist() == [[5.0, 0.0, float("inf")], [1.0, 1.0, float("inf")]]
