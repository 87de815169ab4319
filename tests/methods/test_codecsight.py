"""Oracle: the rule token by token in Python; vectors of clips that are encoded here, with a square that moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ivcp_eval.interface import Signals
from ivcp_eval.interface.ops import budget, evenly
from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods.codecsight import block_motion, motion_grids
from tests.engine import tiny_models
from tests.methods.material import pruned_columns, random_clips, random_signals

av = pytest.importorskip("av")


def encoded(file: Path, frames: int = 9, codec: str = "mpeg4", group: int = 12) -> Path:
    """A texture that stands still, and in it a square of another that moves by 4 pixels a frame to the right."""
    random = np.random.default_rng(0)
    ground, square = (random.integers(0, 256, (8 * n, 8 * m)).astype("uint8") for n, m in ((16, 24), (4, 4)))
    ground, square = (np.kron(one[::8, ::8], np.ones((8, 8), "uint8")) for one in (ground, square))
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=8, options={"g": str(group), "bf": "0"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 192, 128, "yuv420p", 4_000_000
        for number in range(frames):
            picture = ground.copy()
            picture[48:80, 16 + 4 * number : 48 + 4 * number] = square
            frame = av.VideoFrame.from_ndarray(np.stack([picture] * 3, axis=-1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


def slow_choice(motion: list[float], kept: int, still: float = 0.25) -> list[int]:
    """The most moved, then of the equal ones those in the middles of even stretches."""
    moved = [m if m > still else 0.0 for m in motion]
    found: list[int] = []
    for value in sorted(set(moved), reverse=True):
        equal = [i for i, m in enumerate(moved) if m == value]
        left = kept - len(found)
        found += equal if len(equal) <= left else [equal[i] for i in evenly(len(equal), left).tolist()]
    return sorted(found)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
def test_choice(ratio: float, tmp_path: Path) -> None:
    signals = random_clips((5, 3, 4), (0, 3, 3), (2, 2, 3), ratio=ratio)
    generator = torch.Generator().manual_seed(0)
    files = {"0": torch.rand(5, 3, 4, generator=generator), "2": torch.rand(2, 2, 3, generator=generator)}
    files["0"][0] = torch.inf
    save_file(files, tmp_path / "motion.safetensors")
    method = make_method("codecsight", {"motion": str(tmp_path / "motion.safetensors"), "still": 0.4})
    selection = method.select(signals)
    selection.check(signals, "codecsight")
    first = 0
    for motion in (files["0"].flatten(), torch.zeros(9), files["2"].flatten()):
        wanted = slow_choice(motion.tolist(), budget(ratio, len(motion)), 0.4)
        kept = selection.keep[(selection.keep >= first) & (selection.keep < first + len(motion))] - first
        assert kept.tolist() == wanted
        first += len(motion)


def test_without_a_file_tokens_are_spread() -> None:
    signals: Signals = random_signals((4, 5), ratio=0.3)
    assert make_method("codecsight").select(signals).keep.tolist() == evenly(20, 6).tolist()


def test_all_that_moves(tmp_path: Path) -> None:
    motion = torch.tensor([[[torch.inf] * 3], [[0.0, 0.3, 0.25]], [[0.1, 0.0, 4.0]]])
    save_file({"0": motion}, tmp_path / "m")
    signals = random_clips((3, 1, 3), ratio=0.9)
    method = make_method("codecsight", {"motion": tmp_path / "m", "counts": "released"})
    assert method.select(signals).keep.tolist() == [0, 1, 2, 4, 8]


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_vectors_of_an_encoded_stream(codec: str, tmp_path: Path) -> None:
    """Where the square is, its cells moved by 4 pixels a frame; elsewhere nothing does."""
    video = encoded(tmp_path / "clip.mp4", codec=codec)
    got = motion_grids(video, [0, 2, 4, 6, 8], (8, 12))
    assert got.shape == (5, 8, 12)
    assert bool(got[0].isinf().all())
    for step, last in enumerate((2, 4, 6, 8), start=1):
        moved = got[step] > 2
        left = 16 + 4 * last
        inside = range(-(-left // 16), (left + 32) // 16)  # whole columns of cells in the square
        assert moved[3:5, list(inside)].float().mean() > 0.6
        assert not bool(moved[:2].any())
        assert not bool(moved[6:].any())
        assert not bool(moved[:, 8:].any())


def test_a_frame_that_refers_to_no_other_is_new(tmp_path: Path) -> None:
    video = encoded(tmp_path / "clip.mp4", group=4)
    got = motion_grids(video, [1, 4, 6], (4, 6))
    assert [bool(step.isinf().all()) for step in got] == [True, True, False]


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_model_and_a_real_video(tmp_path: Path) -> None:
    """Vectors of a stream decide which tokens of Qwen2.5-VL's video stay."""
    module: Any = tiny_models.family("qwen2_5_vl")
    _, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs = make_inputs("t5 v0 t9")
    grids = motion_grids(encoded(tmp_path / "clip.mp4"), [1, 4, 7], (3, 5))
    save_file({"0": grids}, tmp_path / "m")
    columns = (inputs["input_ids"][0] == module.VIDEO).nonzero().flatten().tolist()
    kept = pruned_columns("codecsight", "qwen2_5_vl", inputs, 0.5, motion=tmp_path / "m")[0]
    wanted = slow_choice(grids.flatten().tolist(), 22)
    assert [columns.index(c) for c in kept if c in columns] == wanted


def test_blocks() -> None:
    names = ("dst_x", "dst_y", "w", "h", "motion_x", "motion_y", "motion_scale")
    rows = [(8, 8, 16, 16, 12, 16, 4), (24, 8, 16, 16, 0, 0, 4), (16, 24, 32, 16, 4, 0, 4)]
    vectors = np.array(rows, dtype=[(name, "i4") for name in names])
    got = block_motion(vectors, (32, 48), (2, 3))
    assert got.tolist() == [[5.0, 0.0, float("inf")], [1.0, 1.0, float("inf")]]


def test_what_is_refused(tmp_path: Path) -> None:
    video = encoded(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match="fewer frames than 10"):
        motion_grids(video, [0, 9], (2, 3))
    with pytest.raises(ValueError, match="must be increasing"):
        motion_grids(video, [3, 1], (2, 3))
    with pytest.raises(ValueError, match="has no motion vectors"):
        motion_grids(encoded(tmp_path / "all.mp4", group=1), [0, 3], (2, 3))
    for motion, words in (
        ({"1": torch.zeros(3, 1, 3)}, r"has the videos \['1'\], the prompt has a video 0"),
        (
            {"0": torch.zeros(3, 3, 1)},
            r"has motion of shape \(3, 3, 1\) for video 0, the prompt shows it in \(3, 1, 3\)",
        ),
        ({"0": -torch.ones(3, 1, 3)}, "below 0 or NaN"),
    ):
        save_file(motion, tmp_path / "m")
        with pytest.raises(ValueError, match=words):
            make_method("codecsight", {"motion": tmp_path / "m"}).select(random_clips((3, 1, 3)))
    for parameters, words in (({"still": -1.0}, "still=-1.0 must be"), ({"counts": "released"}, "motion=FILE")):
        with pytest.raises(ValueError, match=words):
            make_method("codecsight", parameters)
