"""Weights in 8 or 4 bits: every method runs on them, and results say so and are compared with both baselines."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText

from ivcp_eval.cli import main
from ivcp_eval.interface import models
from ivcp_eval.interface.marked import SpecError
from ivcp_eval.interface.registry import adapter
from ivcp_eval.interface.variants import Variant
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.table import read_results
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning import placement
from ivcp_eval.runs.planning.placement import Limits, Placement
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import check

METHODS = [{"method": "fastv", "ratios": [0.5]}]


def spec(models_asked: object) -> dict[str, object]:
    return {"models": models_asked, "benchmarks": ["tiny_mcq"], "methods": METHODS, "controls": []}


@pytest.mark.parametrize("kind", ["int8", "int4"])
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
        for name, said in (
            ("tiny", ""),
            ("tiny@int4", placement.quantiser("int4", "cpu").replace("torchao", "int4 torchao")),
        )
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
        raise placement.PackageNotFoundError(name)

    monkeypatch.setattr(placement, "version", missing)
    monkeypatch.setenv("LMUData", str(tmp_path))
    plan = make(check(spec(["tiny", "tiny@int8"]), "x"), tmp_path / "runs")
    assert list(plan.models) == ["tiny"]
    (problem,) = plan.problems
    assert problem.startswith("tiny@int8: quantised weights (int8) need torchao")
    assert main(["eval", "--weights", "int8", "--data", "tiny_mcq", "--runs", str(tmp_path / "runs")]) != 0
    assert "pip install 'ivcp-eval[quantised]'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bnb8", "bnb4"])
def test_bitsandbytes_stores_weights_as_they_are_loaded(kind: str) -> None:
    """On a CPU, where its kernels are slow, and which plans refuse."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weights = models.locate(f"tiny@{kind}")
    session = Session(weights, Placement().resolve(), replace(Limits.published(weights), max_new_tokens=4))
    linear = {"bnb8": bitsandbytes.nn.Linear8bitLt, "bnb4": bitsandbytes.nn.Linear4bit}[kind]
    kinds = {type(module) for module in session.model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {linear, torch.nn.Linear}
    assert type(session.model.get_output_embeddings()) is torch.nn.Linear
    conversation = [{"image": Image.new("RGB", (224, 224), "red")}, {"text": "What color is the picture?"}]
    answers = [session.answer(conversation, Variant("tiny", method, 0.5)) for method in ("fastv", "divprune")]
    assert [answer.visual_kept for answer in answers] == [32, 32]


def test_bitsandbytes_is_handed_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    config, given = object(), dict[str, Any]()

    class Loaded(torch.nn.Module):
        def to(self, *_: Any) -> Loaded:
            raise AssertionError("quantised weights stay where they were loaded")

    def from_pretrained(source: str, **options: Any) -> tuple[Loaded, dict[str, Any]]:
        given.update(options)
        return Loaded(), {}

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    common: dict[str, Any] = {"revision": None, "dtype": torch.bfloat16, "device": "cuda:1", "attention": "sdpa"}
    source = str(models.locate("tiny").source)
    adapter("qwen2_5_vl").load(source, **common, min_pixels=3136, max_pixels=313600, quantization_config=config)
    assert given["quantization_config"] is config
    assert given["device_map"] == {"": "cuda:1"}
    with pytest.raises(ValueError, match=r"DeepSeek-VL2 cannot be stored by bitsandbytes.*int8 or int4"):
        adapter("deepseek_vl2").load(source, **common, quantization_config=config)


def test_bitsandbytes_needs_its_package_and_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMUData", str(tmp_path))
    command = ["eval", "--weights", "bnb4", "--data", "tiny_mcq", "--device", "cpu", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(placement, "version", {"bitsandbytes": "0.50.2"}.__getitem__)
    assert main(command) != 0
    assert "weights stored as bnb4 by bitsandbytes need a CUDA device, and this is cpu" in capsys.readouterr().err
    assert placement.quantiser("bnb4", "cuda:1") == placement.quantiser("bnb8", "auto") == "bitsandbytes 0.50.2"

    def missing(name: str) -> str:
        raise placement.PackageNotFoundError(name)

    monkeypatch.setattr(placement, "version", missing)
    for refused in (command, ["bench", "throughput", "--size", "tiny", "--weights", "bnb8"]):
        assert main(refused) != 0
        assert "need bitsandbytes, which is not installed: pip install" in capsys.readouterr().err


def test_an_installed_torchao_has_nothing_to_say_to_those_who_do_not_use_it(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    code = f"from ivcp_eval.cli import main; raise SystemExit(main({['method', 'check', 'fastv']!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "torchao" not in done.stderr + done.stdout
    assert "pytree" not in done.stderr
