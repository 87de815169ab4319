"""``ivcp eval`` through VLMEvalKit, on the tiny model with random weights and the shipped benchmarks."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from ivcp_eval.cli import main
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.records.masks import Masks
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.table import read_samples
from ivcp_eval.runs.answering.session import Session
from tests.runs.conftest import Lab
from tests.runs.planning.test_light import called

ALL = ("tiny_grounding", "tiny_mcq", "tiny_short", "tiny_yes_no")


def test_pruned_and_baseline_land_in_one_csv_and_are_reused(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lab.eval("--ratio", "0.5", "--limit", "4") == 0
    rows = lab.rows()
    assert {row["benchmark"] for row in rows} == set(ALL)
    for name in ALL:
        baseline, pruned = (
            next(row for row in rows if (row["benchmark"], row["method"]) == (name, method))
            for method in ("none", "ivc_prune")
        )
        assert baseline["status"] == pruned["status"] == "ok"
        assert baseline["n_samples"] == pruned["n_samples"] == 4
        assert baseline["ratio_kept_final"] == baseline["ratio_kv_cache"] == 1
        assert pruned["ratio_kept_final"] == pytest.approx(0.5, abs=0.01)
        assert pruned["ratio_kv_cache"] == pytest.approx(pruned["ratio_kept_final"], abs=1e-3)
        assert pruned["ratio_kept_final"] < pruned["ratio_layer_mean"] < 1
        assert baseline["prompt_sha256"] == pruned["prompt_sha256"]
        assert not pruned["trained_weights"]
        samples = read_samples(lab.csv.parent / pruned["predictions"])
        before = read_samples(lab.csv.parent / baseline["predictions"])
        assert [s["prompt_sha256"] for s in samples] == [s["prompt_sha256"] for s in before]
        assert all(s["visual_kept"] < s["visual_tokens"] for s in samples)
        for sample in samples:
            masks = Masks.from_text(sample["masks"])
            assert (masks.mask().sum(), masks.mask().size) == (sample["visual_kept"], sample["visual_tokens"])
        assert not any(s["masks"] for s in before), "the baseline cuts nothing"
        assert pruned["score"] / pruned["score_scale"] == pytest.approx(sum(s["score"] for s in samples) / 4)
    out = capsys.readouterr().out
    assert "accuracies mean nothing" in out.lower()

    first = lab.csv.read_bytes()
    monkeypatch.setattr(Session, "__init__", lambda *_, **__: pytest.fail("a finished cell was run again"))
    with monkeypatch.context() as patch:
        patch.setattr("ivcp_eval.runs.planning.plan.make", lambda *_, **__: pytest.fail("a finished run is planned"))
        assert lab.eval("--ratio", "0.5", "--limit", "4") == 0
    assert "every cell is finished" in capsys.readouterr().out
    again = called(*lab.arguments("--ratio", "0.5", "--limit", "4"))
    assert "every cell is finished" in again
    assert "imported [] asked []\ntorch False" in again, "a table that was made before is printed at once"
    assert lab.eval("--ratio", "0.5", "--limit", "4", "--batch", "1") == 0, "asked in other words"
    assert "reusing 8 finished of 8 cells" in capsys.readouterr().out
    assert lab.csv.read_bytes() == first


def test_thinking_is_kept_but_not_scored_and_the_record_says_so(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Session._answer

    def thinks(*args: Any, **more: Any) -> Answer:
        return replace(made(*args, **more), prediction="<think>Yes? No?</think>\n\nYes")

    monkeypatch.setattr(Session, "_answer", thinks)
    assert lab.eval("--data", "tiny_yes_no", "--method", "none", "--limit", "4") == 0
    row = lab.rows()[0]
    path = lab.csv.parent / row["predictions"]
    assert [sample["prediction"] for sample in read_samples(path)] == ["<think>Yes? No?</think>\n\nYes"] * 4
    truth = [line["answer"] for line in read_samples(path)]
    assert [sample["score"] for sample in read_samples(path)] == [float(answer == "Yes") for answer in truth]
    record = json.loads((path.parent / "run.json").read_text())
    assert record["n_thinking"] == 4
    assert record["reason"] == "of 4 answers only what follows </think> was scored"


def test_anything_that_changes_a_prediction_changes_the_cell(lab: Lab) -> None:
    assert lab.eval("--data", "tiny_mcq", "--limit", "2") == 0
    before = {(row["method"], row["run_id"]) for row in lab.rows()}
    assert lab.eval("--data", "tiny_mcq", "--limit", "2", "--set", "layer=1") == 0
    after = {(row["method"], row["run_id"]) for row in lab.rows()}
    assert before < after, "rows are merged"
    assert {method for method, _ in after - before} == {"ivc_prune"}, "the baseline is the same cell"


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bytes(lab: Lab, random_model: Path) -> None:
    """SIGKILL at random moments, then a run to the end: the CSVs of an undisturbed run."""
    options = ("--data", "tiny_mcq", "tiny_yes_no", "--limit", "12")
    assert lab.eval(*options) == 0
    undisturbed = lab.csv.read_bytes()
    samples = [(lab.csv.parent / row["predictions"]).read_bytes() for row in lab.rows()]

    disturbed = Lab(random_model, lab.folder / "disturbed")
    command = [sys.executable, "-m", "ivcp_eval", *disturbed.arguments(*options)]
    environment = {**os.environ, "LMUData": str(lab.folder / "LMUData"), "OMP_NUM_THREADS": "1"}
    draw = random.Random(0)
    cut_short = 0
    for wanted in (1, draw.randint(13, 20), draw.randint(26, 40)):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and _answers(disturbed) < wanted:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        cut_short += _answers(disturbed) < 48
        assert not disturbed.csv.exists()
    assert cut_short, "no run was killed before its end; the test proves nothing"
    assert disturbed.eval(*options) == 0
    assert disturbed.csv.read_bytes() == undisturbed
    assert [(disturbed.csv.parent / row["predictions"]).read_bytes() for row in disturbed.rows()] == samples
    journals = [(disturbed.csv.parent / row["predictions"]).parent / "journal.jsonl" for row in disturbed.rows()]
    assert [path.read_bytes().count(b"\n") for path in journals] == [12] * 4, "a sample was answered twice"


def _answers(lab: Lab) -> int:
    kept = [*lab.folder.glob("runs/**/journal.jsonl"), *lab.folder.glob("runs/**/shards/*.jsonl")]
    return sum(path.read_bytes().count(b"\n") for path in kept)


YAML = """
kind: mcq
prompt: dataset
file: {name}.tsv
metrics: [{{name: accuracy, file: _acc.csv, column: Overall, factor: 100}}]
samples: {{file: "_{{judge}}_result.tsv", column: hit}}
"""


def _png(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (112, 112), colour).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_corrupt_image_is_counted_and_marks_the_cell_incomplete(
    lab: Lab, declared: Callable[[str, str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, corrupt = _png("red"), base64.b64encode(b"not an image at all, though long enough to be one" * 3).decode()
    lines = ["index\timage\tquestion\tA\tB\tanswer"]
    lines += [f"{i}\t{image}\tWhich?\tyes\tno\tA" for i, image in enumerate((whole, corrupt, whole))]
    declared("broken", YAML.format(name="broken"), "\n".join(lines) + "\n")
    assert lab.eval("--data", "broken") == 1
    for row in lab.rows():
        assert row["status"] == "incomplete"
        assert (row["n_samples"], row["n_failed"]) == (3, 1)
        assert "1 of 3 samples failed" in row["reason"]
        samples = read_samples(lab.csv.parent / row["predictions"])
        assert [bool(sample["error"]) for sample in samples] == [False, True, False]
    assert "NOT WHOLE" in capsys.readouterr().out


def test_missing_columns_are_named(
    lab: Lab, declared: Callable[[str, str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    declared("bare", YAML.format(name="bare"), f"index\timage\tquestion\n0\t{_png('red')}\tWhich?\n")
    assert lab.eval("--data", "bare") == 2
    said = capsys.readouterr()
    assert "missing: answer, A, B" in said.out
    assert "nothing was measured" in said.err
    assert not lab.csv.exists()


def test_changed_data_is_refused(
    lab: Lab, declared: Callable[[str, str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    declared("changed", YAML.format(name="changed") + f"sha256: {'f' * 64}\n", "index\n0\n")
    assert lab.eval("--data", "changed") == 2
    assert "checksum" in capsys.readouterr().err


def test_records_and_rows_are_made_again_without_a_model(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.eval("--data", "tiny_mcq", "--limit", "2") == 0
    before = lab.csv.read_bytes()
    records = list((lab.folder / "runs").rglob("run.json"))
    assert len(records) == 2
    for path in [*records, lab.csv]:
        path.unlink()
    assert main(["sweep", "results", "--runs", str(lab.folder / "runs")]) == 0
    assert lab.csv.read_bytes() == before
    assert all(path.is_file() for path in records)
    assert f"2 rows renewed: {lab.csv}" in capsys.readouterr().out
    assert main(["sweep", "results", "--runs", str(lab.folder / "others")]) == 0
    assert "renewed" not in capsys.readouterr().out, "the evaluation's runs are not those"


def test_a_disk_that_is_full_for_the_evaluator_is_said(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """VLMEvalKit leaves an empty file and reads it back."""
    from ivcp_eval.runs.records import scoring
    from ivcp_eval.vlmeval_bridge import register

    register()
    from ivcp_eval.vlmeval_bridge import evaluate

    def empty(*_: Any) -> None:
        raise pd.errors.EmptyDataError("No columns to parse from file")

    with monkeypatch.context() as full:
        full.setattr(evaluate, "score", empty)
        full.setattr(scoring, "room_left", lambda folder: False)
        assert lab.eval("--data", "tiny_mcq", "--limit", "1") == 2
    assert "no space is left at" in capsys.readouterr().err
    assert lab.eval("--data", "tiny_mcq", "--limit", "1") == 0


def test_times_outlive_those_of_another_variant_and_more_can_be_asked(lab: Lab) -> None:
    """The baseline is timed again beside the second variant; the first keeps the one that it was timed beside."""

    def numbers() -> dict[str, int]:
        return {row.method: row.times["prefill"].n for row in compare(lab.csv, resamples=10).rows}

    data = ("--data", "tiny_mcq", "--limit", "3")
    assert lab.eval(*data, "--method", "fastv", "--timing", "1") == 0
    assert lab.eval(*data, "--method", "uniform", "--timing", "1") == 0
    assert numbers() == {"fastv": 1, "uniform": 1}
    assert lab.eval(*data, "--method", "uniform", "--timing", "2") == 0
    assert numbers() == {"fastv": 1, "uniform": 2}


def test_a_parameter_of_ones_own_is_named_also_where_it_is_the_only_variant(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab.eval("--data", "tiny_mcq", "--limit", "1", "--method", "fastv", "--set", "layer=3") == 0
    assert "fastv(layer=3) 0.5" in capsys.readouterr().out
    (row,) = (row for row in lab.rows() if row["method"] == "fastv")
    assert row["set_parameters"] == "layer"


def test_nothing_to_make_again_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "results", "--runs", str(tmp_path / "runs")]) == 0
    assert f"nothing has run yet below {tmp_path}" in capsys.readouterr().out


def test_missing_data_is_said_and_the_rest_is_run(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.eval("--data", "RefCOCO_val", "tiny_mcq", "--limit", "1") == 1
    out = capsys.readouterr().out
    assert "NOT WHOLE: benchmark 'RefCOCO_val': the data is not here" in out
    assert "RefCOCO_val.tsv" in out
    assert {row["benchmark"] for row in lab.rows()} == {"tiny_mcq"}
    assert lab.eval("--data", "RefCOCO_val", "--output", str(lab.folder / "none.csv")) == 2
    assert "the data is not here" in capsys.readouterr().err
    assert not (lab.folder / "none.csv").exists()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of VLMEvalKit's or the hub's servers."""
    asked: list[str] = []

    def refuse(address: str, *_: object, **__: object) -> None:
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlretrieve", refuse)
    return asked


def test_an_estimate_fetches_nothing(lab: Lab, no_network: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.eval("--data", "MMVet", "--estimate") == 2
    assert "benchmark 'MMVet': the data is not here" in capsys.readouterr().err
    assert not no_network


def test_no_data_is_fetched_or_prepared_for_a_model_that_is_not_here(
    lab: Lab, no_network: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "mine.jsonl"
    own.write_text("")
    for name in ("MMStar", str(own)):
        folder = ["--model", "qwen25", "--model-path", str(tmp_path / "weights")]
        assert main(["eval", *folder, "--data", name, "--runs", str(tmp_path / "runs")]) == 2
        assert "holds no config.json" in capsys.readouterr().err
    assert not no_network
    assert lab.eval("--data", "MMStar") == 2
    assert no_network, "the model is here, so the data was asked for"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "ivc_prun"), "did you mean 'ivc_prune'?"),
        (("--model", "tinny"), "did you mean 'tiny'?"),
        (("--data", "tiny_groundin"), "did you mean 'tiny_grounding'?"),
        (("--set", "leyer=3"), "did you mean 'layer'?"),
        (("--set", "layer=99", "--data", "tiny_mcq"), "layer 99"),
        (("--model-path", "nowhere"), "no config.json"),
    ],
)
def test_bad_requests_say_what_to_do(
    lab: Lab, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert lab.eval("--limit", "1", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not lab.csv.exists()


@pytest.mark.parametrize("ratio", ["0", "1.5", "nan"])
def test_no_ratio_outside_its_range(lab: Lab, capsys: pytest.CaptureFixture[str], ratio: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        lab.eval("--ratio", ratio)
    assert f"must be a finite number above 0 and at most 1, got '{ratio}'" in capsys.readouterr().err
    assert not lab.csv.exists()


def test_pictures_that_cost_more_at_any_size_are_counted(lab: Lab) -> None:
    shrunk = ("--data", "tiny_mcq", "--limit", "3", "--method", "downsample", "--ratio", "0.5")
    assert lab.eval(*shrunk, "--min-pixels", str(250 * 28 * 28), "--max-pixels", str(300 * 28 * 28)) == 0
    (row,) = [row for row in lab.rows() if row["method"] == "downsample" and row["metric"] == "accuracy"]
    assert (row["status"], row["reason"]) == ("ok", "3 of 3 samples have pictures that cost more at any size")
    assert row["ratio_asked"] == 0.5 < row["ratio_kept_final"]
