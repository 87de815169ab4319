"""Records follow from answers and scores: a mended cost shows without a GPU, and changed code says what it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.reports.table import read_results, read_samples
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning import plan as planning
from ivcp_eval.runs.planning.closure import Code, code_of
from tests.runs.conftest import Bench, Lab

ROOT = Path(__file__).parents[3]


def flops(bench: Bench) -> dict[tuple[str, str, float], float]:
    rows = read_results(bench.csv)
    return {(row["benchmark"], row["method"], row["ratio_asked"]): row["ratio_flops"] for row in rows}


def by_hand(folder: Path) -> float:
    """The share of FLOPs of a cell, straight from its journal and the sizes in its notes."""
    size = json.loads((folder / "cell.json").read_text())["decoder"]
    taken = whole = 0.0

    def layer(n: int) -> float:
        linear = size["hidden"] * size["head_dim"] * (2 * size["heads"] + 2 * size["kv_heads"])
        linear += 3 * size["hidden"] * size["intermediate"]
        return 2 * n * linear + 2 * n * (n + 1) / 2 * size["heads"] * 2 * size["head_dim"]

    for line in (folder / "journal.jsonl").read_text().splitlines():
        answer = json.loads(line)
        unpruned = size["layers"] * layer(answer["visual_tokens"] + answer["text_tokens"])
        share = sum(layer(n + answer["text_tokens"]) for n in answer["visual_per_layer"]) / unpruned
        taken += share * answer["visual_tokens"]
        whole += answer["visual_tokens"]
    return taken / whole


def test_a_mended_cost_shows_without_answering_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = DecoderShape.of
    with monkeypatch.context() as bug:  # in the formula, and in how the sizes of the decoder are read
        bug.setattr(DecoderShape, "layer_flops", lambda self, tokens, layer=0: tokens**5)
        bug.setattr(DecoderShape, "of", lambda config: replace(sizes(config), intermediate=7))
        assert bench.call("run", "--quiet") == 0
    wrong = flops(bench)
    (folder,) = bench.folder.glob("runs/tiny/tiny_mcq/fastv-*")
    scores = json.loads((folder / "scores.json").read_text())
    scores["made"]["commit"] = "the commit that answered"
    del scores["checksum"]  # of what was written
    (folder / "scores.json").write_text(json.dumps(scores))
    before = read_samples(folder / "predictions.csv")

    for name in ("answer", "answer_all", "answer_batch"):
        monkeypatch.setattr(Session, name, lambda *_: pytest.fail("a sample was answered again"))
    assert bench.call("results") == 0
    right = flops(bench)
    fastv = "tiny_mcq", "fastv", 0.5
    assert right[fastv] == pytest.approx(by_hand(folder), abs=1e-4)
    assert abs(wrong[fastv] - right[fastv]) > 0.01
    assert right["tiny_mcq", "none", 1.0] == 1
    samples = read_samples(folder / "predictions.csv")
    assert all(a["flops_ratio"] != b["flops_ratio"] for a, b in zip(before, samples, strict=True))
    unchanged = ("index", "prediction", "score", "visual_kept", "layer_mean_ratio", "kv_ratio")
    assert [[s[k] for k in unchanged] for s in samples] == [[s[k] for k in unchanged] for s in before]
    commits = {row["ivcp_commit"] for row in read_results(bench.csv) if row["method"] == "fastv"}
    assert "the commit that answered" in commits, "who made the record again did not make the answers"

    results, touched = bench.results(), (folder / "run.json").stat().st_mtime_ns
    assert bench.call("results") == 0
    assert bench.results() == results
    assert (folder / "run.json").stat().st_mtime_ns == touched, "what would not change is not written"

    (folder / "scores.json").unlink()
    capsys.readouterr()
    assert bench.call("results") == 1
    assert "1 cells of small were scored by an earlier version, which kept no scores.json" in capsys.readouterr().out


def test_cells_that_changed_code_leaves_uncounted_are_said(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.call("run", "--quiet") == 0
    assert bench.call("plan") == 0
    assert "not counted" not in capsys.readouterr().out

    def changed(method: str, family: str) -> Code:
        found = dict(code_of(method, family).files)
        return Code({p: "0" * 16 if p == "ivcp_eval/methods/fastv.py" else d for p, d in found.items()})

    monkeypatch.setattr(planning, "code_of", changed)
    said = "2 answered cells of fastv on tiny are not counted: ivcp_eval/methods/fastv.py changed\n"
    for verb in ("plan", "status"):
        bench.call(verb)
        out = capsys.readouterr().out
        assert said in out
        assert out.count("not counted") == 1, "the other cells are reused"
    bench.spec.write_text(bench.spec.read_text().replace("limit: 5", "limit: 4"))
    bench.call("plan")
    assert "not counted" not in capsys.readouterr().out, "fewer rows are another question"

    monkeypatch.setattr(planning.cells, "versions", lambda: {**_versions(bench), "pillow": "0"})
    bench.spec.write_text(bench.spec.read_text().replace("limit: 4", "limit: 5"))
    bench.call("plan")
    out = capsys.readouterr().out
    assert "8 answered cells of none, ivc_prune, downsample on tiny are not counted: pillow was " in out
    assert "ivcp_eval/methods/fastv.py changed; pillow was " in out


def _versions(bench: Bench) -> dict[str, Any]:
    path = next(bench.folder.glob("runs/tiny/tiny_mcq/none-*/cell.json"))
    found: dict[str, Any] = json.loads(path.read_text())["identity"]["versions"]
    return found


def test_times_that_were_measured_later_reach_the_rows(lab: Lab) -> None:
    """The cells were scored by a run that timed nothing; the next one answers nothing, and times."""
    data = ("--data", "tiny_mcq", "--limit", "2")
    assert lab.eval(*data) == 0
    assert {row["prefill_ms_median"] for row in lab.rows()} == {None}
    # In a process of its own, which answers nothing before it times and so has not met VLMEvalKit yet.
    command = [sys.executable, "-m", "ivcp_eval", *lab.arguments(*data, "--timing", "2")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert all(row["prefill_ms_median"] > 0 for row in lab.rows())
