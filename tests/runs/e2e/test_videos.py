"""Videos from files and from the shipped set to rows: answered, pruned, recorded, continued, refused."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import clips
from ivcp_eval.interface import Frame, Geometry
from ivcp_eval.interface.records.masks import Masks
from ivcp_eval.lab import rooms
from ivcp_eval.methods import geo3dpruner
from ivcp_eval.methods._clips import Clip
from ivcp_eval.methods.geo3dpruner import voxels
from ivcp_eval.reports.html.collect import collect
from ivcp_eval.reports.table import Row, read_samples
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.vlmeval_bridge.reading import own as own_data
from tests.benchmarks.test_motion import encoded
from tests.benchmarks.test_motion import pictures as moving_square
from tests.runs.conftest import Lab
from tests.videos import sound, video

EVS = ("--method", "evs", "--ratio", "0.5")


def rows_of(lab: Lab, benchmark: str) -> dict[str, Row]:
    return {
        str(row["method"]): row for row in lab.rows() if row["benchmark"] == benchmark and row["metric"] == "accuracy"
    }


def identity(lab: Lab, benchmark: str) -> dict[str, object]:
    (path,) = (lab.folder / "runs" / "tiny" / benchmark).glob("none-*/run.json")
    found: dict[str, object] = json.loads(path.read_text())["identity"]
    return found


def test_the_shipped_clips_run_and_continue(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight pictures of two frames are eight grid steps; an interrupted run goes on behind its last answer."""
    answered, real = 0, Session.answer_batch

    def counted(session: Session, *args: object, **kwargs: object) -> object:
        nonlocal answered
        answered += 1
        if answered == 2:
            raise KeyboardInterrupt
        return real(session, *args, **kwargs)  # type: ignore[arg-type]

    command = ("--data", "tiny_clips", *EVS, "--limit", "6", "--batch", "3")
    monkeypatch.setattr(Session, "answer_batch", counted)
    assert lab.eval(*command) == 130
    assert lab.eval(*command) == 0
    assert answered == 3, "the first batch was kept"
    row = rows_of(lab, "tiny_clips")["evs"]
    assert (row["status"], row["n_samples"], row["n_failed"], row["video"]) == ("ok", 6, 0, "")
    samples = read_samples(lab.csv.parent / str(row["predictions"]))
    assert [(s["visual_tokens"], s["visual_kept"]) for s in samples] == [(128, 64)] * 6
    for sample in samples:
        masks = Masks.from_text(sample["masks"])
        assert [image.frame for image in masks.images] == [Frame(0, i, i / 2) for i in range(8)]
        assert sum(masks.kept(i) for i in range(8)) == 64


def test_depth_and_poses_reach_a_method(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every step those of its view; a variant that leaves parts of the prefill out says what it would cost."""
    seen: list[Geometry | None] = []

    def noted(clip: Clip, size: float, side: int) -> Tensor:
        seen.extend(frame.span.frame and frame.span.frame.geometry for frame in clip.frames)
        return voxels(clip, size, side)

    monkeypatch.setattr(geo3dpruner, "voxels", noted)
    one = ("--data", "tiny_rooms", "--limit", "1", "--ratio", "0.5", "--method")
    assert lab.eval(*one, "geo3dpruner") == lab.eval(*one, "adaspark", "--set", "cube=2,2,2") == 0
    views = rooms.room("test", 0)[1]
    assert [shown and shown.pose.tolist() for shown in seen] == [view.geometry.pose.round(6).tolist() for view in views]
    found = rows_of(lab, "tiny_rooms")
    assert (found["geo3dpruner"]["ratio_kept_final"], found["geo3dpruner"]["ratio_flops_analytic"]) == (0.5, None)
    sparse = found["adaspark"]
    assert sparse["ratio_kept_final"] == sparse["ratio_flops"] == sparse["ratio_kv_cache"] == 1
    assert 0.4 < float(str(sparse["ratio_flops_analytic"])) < 1


def test_the_frames_of_a_run_may_be_chosen(lab: Lab, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of pictures in a table and of files; a cell of its own for each choice, and for each file that they are of."""
    one = (*EVS, "--limit", "1")
    seen = []
    for data, asked, said in (
        ("tiny_clips", ("--nframe", "4"), "nframe=4"),
        ("tiny_clips", ("--fps", "0.25"), "fps=0.25"),
        (str(own), ("--fps", "2"), f"fps=2.0, {clips.decoder()}"),
    ):
        assert lab.eval("--data", data, *asked, *one) == 0
        row = rows_of(lab, Path(data).stem)["evs"]
        assert (row["video"], row["n_failed"]) == (said, 0)
        samples = read_samples(lab.csv.parent / str(row["predictions"]))
        seen.append([image.frame for image in Masks.from_text(samples[0]["masks"]).images])
    assert seen == [
        [Frame(0, 0, 0.75), Frame(0, 1, 2.25)],
        [Frame(0, 0, 0.0)],
        [Frame(0, 0, 0.0), Frame(0, 1, 1.0)],
    ]
    video(own.parent / "b.mkv", [0.0, 0.5], size=(112, 84), codec="ffv1")
    before = row["run_id"]
    assert lab.eval("--data", "mine", "--fps", "2", *one) == 0
    assert rows_of(lab, "mine")["evs"]["run_id"] != before, "the frames of the file are asked for, so it counts"
    assert lab.eval("--data", "tiny_short", "--nframe", "4", *one) == 2
    assert "tiny_short shows none" in capsys.readouterr().err


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A JSONL of three questions on two files."""
    video(tmp_path / "a.mp4", [i / 10 for i in range(20)], size=(112, 84))
    video(tmp_path / "b.mkv", [0.0, 0.2, 0.9, 2.0, 2.1], size=(112, 84), codec="ffv1")
    lines = [
        {"video": "a.mp4", "nframe": 4, "question": "Is it grey?", "answer": "yes"},
        {"video": "a.mp4", "question": "Is it red?", "answer": "no"},
        {"video": "b.mkv", "fps": 1, "question": "Is it blue?", "answer": "no"},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def table(name: str) -> list[dict[str, str]]:
    with (benchmarks.own_folder() / f"{name}.tsv").open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def test_own_videos_become_rows(lab: Lab, own: Path) -> None:
    """Frames, their times and the decoder are noted before anything is answered, and are part of what a run is."""
    command = ("--data", str(own), *EVS)
    assert lab.eval(*command) == 0
    row = rows_of(lab, "mine")["evs"]
    assert (row["status"], row["n_failed"], row["video"]) == ("ok", 0, f"rows, {clips.decoder()}")
    assert identity(lab, "mine")["video"] == row["video"]
    noted = table("mine")
    assert [json.loads(line["frame_seconds"]) for line in noted] == [
        [0.4, 0.8, 1.2, 1.6],
        [0.2, 0.4, 0.6, 0.8, 1.1, 1.3, 1.5, 1.7],
        [0.0, 0.9, 2.0],
    ]
    assert {line["decoder"] for line in noted} == {clips.decoder()}
    samples = read_samples(lab.csv.parent / str(row["predictions"]))
    steps = [[image.frame for image in Masks.from_text(sample["masks"]).images] for sample in samples]
    assert steps[0] == [Frame(0, 0, 0.4), Frame(0, 1, 1.2)]
    assert steps[2] == [Frame(0, 0, 0.0), Frame(0, 1, 2.0)]
    assert samples[0]["cluster"] != samples[2]["cluster"]
    before = row["run_id"]
    assert lab.eval(*command) == 0, "made of the same file, it is the same benchmark"
    assert rows_of(lab, "mine")["evs"]["run_id"] == before
    own.write_text(own.read_text().replace('"nframe": 4', '"nframe": 2'))
    assert lab.eval(*command) == 0
    assert rows_of(lab, "mine")["evs"]["run_id"] != before


@pytest.mark.parametrize("asked", [(), ("--nframe", "5")])
@pytest.mark.parametrize("data", ["tiny_clips", "own"])
def test_the_report_shows_every_frame_and_cut(lab: Lab, own: Path, data: str, asked: tuple[str, ...]) -> None:
    """The steps side by side in one picture; cells per step are those of the samples."""
    name = "mine" if data == "own" else data
    command = ("--data", str(own) if data == "own" else data, "--limit", "2", *asked, "--ratio", "0.5")
    assert lab.eval(*command, "--method", "holitom") == 0
    row = rows_of(lab, name)["holitom"]
    samples = {s["index"]: s for s in read_samples(lab.csv.parent / str(row["predictions"]))}
    report = collect(lab.csv)
    assert not report.unread
    assert {picture.index for picture in report.pictures} == set(samples)
    for picture in report.pictures:
        sample = samples[picture.index]
        masks = Masks.from_text(sample["masks"])
        rows, columns = masks.images[0].views[0].cells.shape
        _, shown = picture.shown
        assert (shown.tokens, [cut.layer for cut in shown.cuts]) == (sample["visual_tokens"], [0, 5])
        assert shown.cuts[-1].kept == sample["visual_kept"]
        assert shown.grid is not None
        assert (shown.grid[0] % rows, shown.grid[1] % columns) == (0, 0)
        for number, cut in enumerate(shown.cuts):
            assert len(cut.dropped) == shown.tokens - cut.kept
            across = shown.grid[1] // columns
            places = [divmod(cell, shown.grid[1]) for cell in cut.dropped]
            of_step = [row // rows * across + column // columns for row, column in places]
            dropped = [rows * columns - masks.kept(step, number) for step in range(len(masks.images))]
            assert [of_step.count(step) for step in range(len(masks.images))] == dropped
        with Image.open(io.BytesIO(picture.jpeg)) as image:
            assert image.width / image.height == pytest.approx(picture.size[0] / picture.size[1], rel=0.02)
    if data == "own":
        video(own.parent / "a.mp4", [0.0, 0.3, 0.5, 0.8, 1.0, 2.0], size=(112, 84))
        other = "the videos on this machine are not those" if asked else "its frames are not those that were recorded"
        assert all(other in picture.missing for picture in collect(lab.csv).pictures), "others are never shown"
        (own.parent / "a.mp4").unlink()
        gone = r"video a\.mp4 is not on this machine" if asked else r"video .*a\.mp4 is not here, or is no file"
        assert all(re.fullmatch(gone, picture.missing) for picture in collect(lab.csv).pictures)


@pytest.mark.parametrize("source", ["file", "pictures"])
def test_what_moves_in_the_stream_stays(lab: Lab, tmp_path: Path, source: str) -> None:
    """CodecSight reads the motion of each clip itself: behind the first step, cells of the square that moves."""
    if source == "file":
        encoded(tmp_path / "a.mp4", group=600)
        shown: dict[str, object] = {"video": "a.mp4", "nframe": 9}
    else:
        names = [f"{i}.png" for i in range(9)]
        for name, picture in zip(names, moving_square(9), strict=True):
            Image.fromarray(picture).save(tmp_path / name)
        shown = {"video": names, "seconds": list(range(9))}
    (tmp_path / "moving.jsonl").write_text(json.dumps({**shown, "question": "Is it?", "answer": "yes"}))
    command = ("--data", str(tmp_path / "moving.jsonl"), "--method", "codecsight", "--set", "counts=released")
    assert lab.eval(*command, "--ratio", "0.9") == 0
    row = rows_of(lab, "moving")["codecsight"]
    assert (row["status"], row["n_failed"]) == ("ok", 0)
    (sample,) = read_samples(lab.csv.parent / str(row["predictions"]))
    masks = Masks.from_text(sample["masks"])
    (path,) = (lab.folder / "runs" / "tiny" / "moving").glob("codecsight-*/run.json")
    assert json.loads(path.read_text())["identity"]["versions"]["av"] == version("av"), "who encodes, and who decodes"
    rows, columns = masks.images[0].views[0].cells.shape
    kept = [masks.kept(i) for i in range(len(masks.images))]
    assert kept[0] == rows * columns
    assert all(0 < n <= rows * columns / 3 for n in kept[1:]), kept


def test_files_that_cannot_be_decoded_are_named_and_nothing_is_written(
    lab: Lab, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (own.parent / "a.mp4").read_bytes()
    (own.parent / "a.mp4").write_bytes(whole[: len(whole) // 2])
    sound(own.parent / "b.mkv")
    assert lab.eval("--data", str(own), *EVS) == 2
    said = capsys.readouterr().err
    assert "line 1: video" in said
    assert "is damaged, or no video" in said
    assert "line 3: " in said
    assert "holds sound alone" in said
    assert "nothing was written" in said
    assert not (benchmarks.own_folder() / "mine.tsv").exists()


def test_a_file_that_changes_later_is_a_row_that_cannot_be_answered(lab: Lab, own: Path) -> None:
    """Two rows go on; the third counts as wrong, for the baseline too, and is never answered about other frames."""
    own_data.add(own)
    video(own.parent / "b.mkv", [0.0, 0.5, 1.0], size=(112, 84), codec="ffv1")
    assert lab.eval("--data", "mine", *EVS) == 0
    for method in ("none", "evs"):
        row = rows_of(lab, "mine")[method]
        assert (row["status"], row["n_samples"], row["n_failed"]) == ("ok", 3, 1)
        assert "1 of 3 samples cannot be answered and count as wrong (OtherFrames 1)" in str(row["reason"])


def test_pictures_with_times_are_a_video(lab: Lab, tmp_path: Path) -> None:
    """A folder, or a list."""
    (tmp_path / "clip").mkdir()
    for i in range(4):
        Image.new("RGB", (112, 84), (60 * i,) * 3).save(tmp_path / "clip" / f"{i}.png")
    lines = [
        {"video": "clip", "seconds": [0, 1, 2, 4], "question": "Is it grey?", "answer": "yes"},
        {"video": ["clip/0.png", "clip/3.png"], "seconds": [0, 3.5], "question": "Is it red?", "answer": "no"},
        {"image": "clip/1.png", "question": "Is it red?", "answer": "no"},
    ]
    (tmp_path / "frames.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert lab.eval("--data", str(tmp_path / "frames.jsonl"), *EVS) == 0
    row = rows_of(lab, "frames")["evs"]
    assert (row["status"], row["n_failed"], row["video"]) == ("ok", 0, "")
    samples = read_samples(lab.csv.parent / str(row["predictions"]))
    steps = [[image.frame for image in Masks.from_text(sample["masks"]).images] for sample in samples]
    assert steps == [[Frame(0, 0, 0.0), Frame(0, 1, 2.0)], [Frame(0, 0, 0.0)], [None]]
    assert len(ast.literal_eval(table("frames")[0]["image"])) == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"video": "a.mp4", "nframe": 2, "fps": 1}, "give one of them"),
        ({"video": "a.mp4", "nframe": 0}, "give one of them"),
        ({"video": "a.mp4", "image": "a.png"}, "either image or video"),
        ({"image": "0.png", "fps": 1}, "fps cannot be said of an image"),
        ({"video": ["0.png", "0.png"]}, "0 times for 2 frames"),
        ({"video": ["0.png"], "seconds": [0], "nframe": 1}, "nframe cannot be said of frames"),
        ({"video": "gone.mp4"}, "video 'gone.mp4': there is no such file"),
        ({"video": "empty"}, r"video 'empty': no pictures"),
    ],
)
def test_lines_that_say_no_video(
    lab: Lab, own: Path, line: dict[str, object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (112, 84)).save(own.parent / "0.png")
    (own.parent / "empty").mkdir()
    own.write_text(json.dumps({**line, "question": "Is it?", "answer": "yes"}))
    assert lab.eval("--data", str(own), *EVS) == 2
    assert re.search(f"line 1: .*({words})", capsys.readouterr().err)
