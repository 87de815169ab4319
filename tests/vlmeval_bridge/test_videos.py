"""Miniatures of VLMEvalKit's video sets: its own classes ask and score, our reader, decoder and journal do the rest."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import clips
from ivcp_eval.benchmarks.clips import Sampling
from ivcp_eval.files import file_digest
from ivcp_eval.interface import Frame
from ivcp_eval.interface.failures import InputRefused
from ivcp_eval.interface.records.masks import Masks
from ivcp_eval.interface.registry import adapter
from ivcp_eval.reports.html.collect import collect
from ivcp_eval.reports.table import read_samples
from ivcp_eval.vlmeval_bridge import register
from ivcp_eval.vlmeval_bridge.environment import import_vlmeval
from ivcp_eval.vlmeval_bridge.reading.pictures import Unpacking
from tests.runs.conftest import Lab, lab  # noqa: F401 (a fixture)
from tests.videos import STEP, video

QUESTIONS = {"question": "What is shown?", "candidates": "['A. grey', 'B. red', 'C. green', 'D. blue']"}
SETS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    # columns beside the index, where the video lies, right answers in the ways in which people give them
    "Video-MME": (
        {**QUESTIONS, "video": "v", "video_path": "./video/v.mp4", "duration": "short", "domain": "Knowledge"}
        | {"sub_category": "Law", "task_type": "Counting Problem", "subtitle_path": "./none.srt", "answer": "A"},
        "video/v.mp4",
        ["A", "A. grey", "The best answer is A.", "(A)"],
    ),
    "MVBench_MP4": (
        {**QUESTIONS, "task_type": "Action Count", "prefix": "p", "video": "v.mp4"}
        | {"candidates": "['grey', 'red', '3']", "answer": "grey"},
        "p/v.mp4",
        ["(A) grey", "A", "A)", "(a)"],
    ),
    "MLVU_MCQ": (
        {**QUESTIONS, "task_type": "count", "prefix": "./MLVU/video/4_count", "video": "v.mp4", "duration": 2.5}
        | {"candidates": "['grey', 'red', '3']", "answer": "grey"},
        "MLVU/video/4_count/v.mp4",
        ["(A) grey", "A", "A)", "(A)"],
    ),
    "LongVideoBench": (
        {**QUESTIONS, "video": "v", "video_path": "videos/v.mp4", "subtitle_path": "none.json", "duration": 2.5}
        | {
            "candidates": "['grey', 'red', '3']",
            "correct_choice": 0,
            "question_category": "S2E",
            "topic_category": "NP",
        }
        | {"duration_group": 15, "starting_timestamp_for_subtitles": 0},
        "videos/v.mp4",
        ["A", "A. grey", "The best answer is A.", "(A)"],
    ),
    "TempCompass_MCQ": (
        {
            **QUESTIONS,
            "task_type": "multi-choice",
            "prefix": "./videos",
            "suffix": ".mp4",
            "video": "v",
            "dim": "action",
        }
        | {"answer": "A. grey"},
        "videos/v.mp4",
        ["A", "A. grey", "A.", "A. grey"],
    ),
}


@pytest.fixture
def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put the miniature of a set into a data root of its own; gives the video file."""
    import_vlmeval()
    import vlmeval.dataset

    root = tmp_path / "LMUData"
    root.mkdir(exist_ok=True)
    monkeypatch.setenv("LMUData", str(root))

    def place(name: str) -> Path:
        row, where, right = SETS[name]
        cls = next(c for c in vlmeval.dataset.DATASET_CLASSES if name in c.supported_datasets())
        monkeypatch.setattr(cls, "MP4_MD5" if hasattr(cls, "MP4_MD5") else "MD5", "")
        rows = [{"index": i, **row} for i in range(len(right))]
        pd.DataFrame(rows).to_csv(root / f"{name}.tsv", sep="\t", index=False)
        path = root / "videos" / name / where
        path.parent.mkdir(parents=True)
        return video(path, [i / 10 for i in range(30)], size=(112, 84))

    return place


@pytest.mark.parametrize("name", SETS)
def test_its_own_evaluator_scores_what_was_kept(name: str, placed: Callable[[str], Path], tmp_path: Path) -> None:
    """All right, all wrong, half, and answers that say nothing, which are wrong and not left out."""
    register()
    from ivcp_eval.vlmeval_bridge import evaluate

    placed(name)
    benchmark, right = benchmarks.load(name), SETS[name][2]
    dataset = evaluate.build(benchmark, None)
    given = {
        "right": right,
        "wrong": ["B"] * 4,
        "half": [*right[:2], "B", "B"],
        "nothing": ["", "null", "None", "?"],
    }
    for kind, score in {"right": 100, "wrong": 0, "half": 50, "nothing": 0}.items():
        folder = tmp_path / kind
        folder.mkdir()
        answers = {str(i): text for i, text in enumerate(given[kind])}
        scored = evaluate.score(benchmark, dataset, evaluate.stored(dataset, answers, folder))
        assert scored.metrics == {"accuracy": (score, 100.0)}, kind
        assert sorted(scored.samples) == ["0", "1", "2", "3"]
        assert sum(scored.samples.values()) == score / 25


@pytest.mark.parametrize("name", SETS)
def test_it_asks_about_the_file_and_we_sample_it(name: str, placed: Callable[[str], Path], tmp_path: Path) -> None:
    """No picture is written; the prompt's hash is that of the file's bytes, the sampling and the decoder."""
    register()
    from ivcp_eval.vlmeval_bridge import evaluate
    from ivcp_eval.vlmeval_bridge.model import Prompting

    path = placed(name)
    sampling = Sampling.of(benchmarks.load(name).sampling)
    dataset = evaluate.build(benchmarks.load(name), 2)
    prompting = Prompting(adapter("qwen2_5_vl"))
    first, _ = evaluate.messages(dataset, prompting)
    assert first.message is not None, first.failure
    (part,) = [part for part in first.message if part["type"] == "video"]
    assert (Path(part["value"]).resolve(), part["nframe"]) == (path.resolve(), sampling.nframe)
    assert "What is shown?" in "".join(part["value"] for part in first.message if part["type"] == "text")
    assert not list(tmp_path.rglob("*.jpg"))
    video(path, [i / 10 for i in range(20)], size=(112, 84))
    changed, _ = evaluate.messages(dataset, prompting)
    assert changed.key != first.key
    assert changed.pictures != first.pictures


def the_report_shows(lab: Lab, name: str, path: Path, samples: list[dict[str, Any]]) -> None:  # noqa: F811
    """The frames that were asked about, with the kept cells of each, found where the set's own class finds them; and
    in words why not, where the file is gone or another one."""
    report = collect(lab.csv)
    assert not report.unread
    for picture, sample in zip(report.pictures, samples, strict=True):
        masks = Masks.from_text(sample["masks"])
        assert (picture.index, picture.missing, picture.frames, picture.drawn) == (sample["index"], "", 4, 4)
        assert picture.question.startswith("What is shown?")
        _, shown = picture.shown
        assert shown.cuts[-1].by_frame == tuple(masks.kept(step) for step in range(4))
        with Image.open(io.BytesIO(picture.jpeg)) as sheet:
            # Two by two steps of two frames, of which the first is drawn: of 30 frames numbers 3, 10, 16 and 23.
            inside = [sheet.getpixel((sheet.width * (1 + 2 * x) // 4, sheet.height * 7 // 16 + sheet.height * y // 2))
                      for y in (0, 1) for x in (0, 1)]  # fmt: skip
        assert [round(grey[0] / STEP) for grey in inside] == [n % 20 for n in (3, 10, 16, 23)]
    content = path.read_bytes()
    path.unlink()
    (path.parent / "another.mp4").write_bytes(content)
    gone = collect(lab.csv).pictures
    assert [picture.question[:14] for picture in gone] == ["What is shown?"] * 4
    where = f"video {path.stem if name in ('Video-MME', 'LongVideoBench', 'TempCompass_MCQ') else path.name} is not on"
    assert [picture.missing for picture in gone] == [f"{where} this machine (below videos/{name})"] * 4
    assert [picture.shown[1].cuts[-1].kept for picture in gone] == [sample["visual_kept"] for sample in samples]
    path.write_bytes(content[:-1])
    changed = collect(lab.csv).pictures
    assert {picture.missing for picture in changed} == {
        "the videos on this machine are not those that were asked: files are missing, new or changed"
    }
    path.write_bytes(content)
    (path.parent / "another.mp4").unlink()


@pytest.mark.parametrize("name", SETS)
def test_from_the_command_line_to_rows(
    name: str,
    lab: Lab,  # noqa: F811 (before `placed`, which goes on in its data root)
    placed: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Decoded, answered unpruned and pruned, scored by the set's own class; a damaged file is a miss of all.

    Two sets show 64 frames where nobody asks for fewer.
    """
    (tmp_path / "declared").mkdir()
    declaration = (benchmarks.FOLDER / f"{name}.yaml").read_text().splitlines()
    path = placed(name)
    md5 = file_digest(Path(os.environ["LMUData"]) / f"{name}.tsv", "md5")  # noqa: SIM112 (VLMEvalKit's name)
    noted = [f"md5: {md5}" if line.startswith("md5:") else line for line in declaration]
    (tmp_path / "declared" / f"{name}.yaml").write_text("\n".join(noted))
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path / "declared")
    asked = () if benchmarks.load(name).sampling == "nframe=8" else ("--nframe", "8")
    command = ("--data", name, "--method", "evs", "--ratio", "0.5", *asked)
    assert lab.eval(*command) == 0
    rows = {row["method"]: row for row in lab.rows()}
    for method, kept in (("none", 1.0), ("evs", 0.5)):
        row = rows[method]
        assert (row["status"], row["n_samples"], row["n_failed"]) == ("ok", 4, 0), row["reason"]
        assert (row["ratio_kept_final"], row["video"]) == (kept, f"nframe=8, {clips.decoder()}")
    samples = read_samples(lab.csv.parent / str(rows["evs"]["predictions"]))
    frames = [image.frame for image in Masks.from_text(samples[0]["masks"]).images]
    assert frames == [Frame(0, i, at) for i, at in enumerate((0.3, 1.0, 1.6, 2.3))]
    for method in rows:
        own = read_samples(lab.csv.parent / str(rows[method]["predictions"]))
        assert [sample["seconds_per_step"] for sample in own] == [pytest.approx((2.3 - 0.3) / 3, abs=0.02)] * 4
    the_report_shows(lab, name, path, samples)
    path.write_bytes(path.read_bytes()[:500])
    assert lab.eval(*command) != 0
    cells = (lab.folder / "runs" / "tiny" / name).glob("*/run.json")
    failed = [record for cell in cells if (record := json.loads(cell.read_text()))["n_failed"]]
    assert [record["status"] for record in failed] == ["incomplete"] * 2, "other files are other cells"
    assert ["4 of 4 samples failed (DamagedVideo 4)" in record["reason"] for record in failed] == [True] * 2, failed[0][
        "reason"
    ]


def test_its_own_loop_never_asks_about_a_file_it_does_not_show() -> None:
    data = Unpacking()
    with pytest.raises(InputRefused, match="use ivcp eval"):
        data.dump_image({"video": "a.mp4"})
    data.adds_videos = True  # our runner does
    assert data.dump_image({"video": "a.mp4"}) == []
