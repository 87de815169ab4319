"""Weights in 8 or 4 bits: every method runs on them, and results say so and are compared with both baselines."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from ivcp_eval.cli import main
from ivcp_eval.interface import models
from ivcp_eval.interface.marked import SpecError
from ivcp_eval.interface.variants import Variant
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.table import read_results
from ivcp_eval.runs.answering import quantising
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import check

METHODS = [{"method": "fastv", "ratios": [0.5]}]


def spec(models_asked: object) -> dict[str, object]:
    return {"models": models_asked, "benchmarks": ["tiny_mcq"], "methods": METHODS, "controls": []}


@pytest.mark.parametrize("kind", models.QUANTISED)
def test_methods_run_on_quantised_weights(kind: str) -> None:
    pytest.importorskip("torchao")
    weights = models.locate(f"tiny@{kind}")
    session = Session(weights, Placement().resolve(), replace(Limits.published(weights), max_new_tokens=4))
    whole = Session(models.locate("tiny"), Placement().resolve(), session.limits)
    pairs = [
        (one.weight, other.weight)
        for one, other in zip(session.model.modules(), whole.model.modules(), strict=True)
        if isinstance(one, torch.nn.Linear)
    ]
    changed = [(one, other) for one, other in pairs if type(one) is not type(other)]
    assert len(changed) == len(pairs) - 1, "all but the output head"
    for one, other in changed:
        error = (one.dequantize() - other).abs().max() / other.abs().max()  # type: ignore[operator]
        assert 0 < error < {"int8": 1 / 127, "int4": 1 / 7}[kind]
    conversation = [{"image": Image.new("RGB", (224, 224), "red")}, {"text": "What color is the picture?"}]
    variants = [Variant("tiny"), Variant("tiny", "fastv", 0.5), Variant("tiny", "divprune", 0.25)]
    variants.append(Variant("tiny", "quota", 0.5))
    together = session.answer_all(conversation, variants)
    assert [answer.visual_kept for answer in together] == [64, 32, 16, 32]
    assert together == [session.answer(conversation, variant) for variant in variants]


def test_a_sweep_over_ways_to_store_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setenv("LMUData", str(tmp_path))
    path, runs = tmp_path / "stored.yaml", ["--runs", str(tmp_path / "runs"), "--quiet"]
    path.write_text(yaml.safe_dump({**spec({"tiny": {"quantise": ["none", "int4"]}}), "limit": 6, "timing": 0}))
    assert main(["sweep", "run", str(path), *runs]) == 0
    rows = {(row["model"], row["method"]): row for row in read_results(tmp_path / "stored.csv")}
    assert {key: row["quantised"] for key, row in rows.items()} == {
        (name, method): said
        for name, said in (("tiny", ""), ("tiny@int4", quantising.quantiser().replace("torchao", "int4 torchao")))
        for method in ("none", "fastv")
    }
    assert len({row["run_id"] for row in rows.values()}) == 4
    assert len({row["revision"] for row in rows.values()}) == 1, "one checkpoint"
    own = {(row.model, row.method): row for row in compare(tmp_path / "stored.csv").rows}
    full = {row.method: row for row in compare(tmp_path / "stored.csv", against="full").rows}
    assert set(own) == {("tiny", "fastv"), ("tiny@int4", "fastv")}
    assert set(full) == {"none", "fastv"}
    for row in full.values():
        assert row.score_baseline == rows["tiny", "none"]["score"]
        assert row.score_pruned == rows["tiny@int4", row.method]["score"]
        assert row.paired
        assert any("quantised: baseline empty" in note for note in row.notes)
    assert own["tiny@int4", "fastv"].score_baseline == rows["tiny@int4", "none"]["score"]


def test_names_and_mistakes() -> None:
    assert list(check(spec({"tiny": {"quantise": ["none", "int8"]}}), "x").models) == ["tiny", "tiny@int8"]
    assert list(check(spec(["tiny@int4"]), "x").models) == ["tiny@int4"]
    for asked, said in (
        (["tiny@int3"], "unknown kind of weights 'int3'; did you mean 'int"),
        ({"tiny": {"quantise": ["int2"]}}, "unknown kind of weights 'int2'"),
        ({"tiny": {"quantise": ["int8"], "served": {"base_url": "http://h/v1"}}}, "not ours to quantise"),
        ({"tiny": {"quantize": ["int8"]}}, "unknown key 'quantize'; did you mean 'quantise'"),
        ({"tiny": {"path": 3}}, "path 3 is no folder"),
    ):
        with pytest.raises(SpecError, match=said):
            check(spec(asked), "x")


def test_without_the_library_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> str:
        raise quantising.PackageNotFoundError(name)

    monkeypatch.setattr(quantising, "version", missing)
    monkeypatch.setenv("LMUData", str(tmp_path))
    plan = make(check(spec(["tiny", "tiny@int8"]), "x"), tmp_path / "runs")
    assert list(plan.models) == ["tiny"]
    (problem,) = plan.problems
    assert problem.startswith("tiny@int8: quantised weights need torchao")
    assert main(["eval", "--weights", "int8", "--data", "tiny_mcq", "--runs", str(tmp_path / "runs")]) != 0
    assert "pip install 'ivcp-eval[quantised]'" in capsys.readouterr().err


def test_an_installed_torchao_has_nothing_to_say_to_those_who_do_not_use_it(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    code = f"from ivcp_eval.cli import main; raise SystemExit(main({['method', 'check', 'fastv']!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "torchao" not in done.stderr + done.stdout
    assert "pytree" not in done.stderr
