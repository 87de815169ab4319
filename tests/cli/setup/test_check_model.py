"""`ivcp check-model` passes a sound model and names what is wrong with a broken one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ivcp_eval.cli import main
from ivcp_eval.interface import models
from ivcp_eval.lab.model_check import check_model
from ivcp_eval.lab.tiny.processor import build_random
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_random(path, seed=1)
    return path


def _session(folder: Path) -> Session:
    placement = Placement("cpu").resolve()
    return Session(models.locate("tiny", folder), placement, Limits(4 * 28 * 28, 1024 * 28 * 28, 4))


def test_a_sound_model_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-model", "tiny", "--path", str(folder), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "every check passed" in out
    assert "FAIL" not in out


def test_a_signal_that_the_model_does_not_use_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = _session(folder)
    right = type(session.adapter).projection
    layer = session.adapter.text_model(session.model).layers[
        len(session.adapter.text_model(session.model).layers) // 2 - 1
    ]
    copies = {signal: torch.nn.Identity() for signal in ("value", "key", "query")}
    for signal, copy in copies.items():
        module, _ = right(session.adapter, layer, signal)
        module.register_forward_hook(lambda _m, _a, output, copy=copy: (copy(output), None)[1])

    def misplaced(self, layer, signal):  # type: ignore[no-untyped-def]
        return copies[signal], right(self, layer, signal)[1]

    monkeypatch.setattr(type(session.adapter), "projection", misplaced)
    failures = check_model(session, lambda text: None)
    assert any("signal value: overwriting it does not change the logits" in failure for failure in failures), failures


def test_a_signal_of_the_wrong_shape_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = _session(folder)
    right = type(session.adapter).projection

    def unsplit(self, layer, signal):  # type: ignore[no-untyped-def]
        module, heads = right(self, layer, signal)
        return module, (lambda states: heads(states).flatten(1, 2)[:, None])

    monkeypatch.setattr(type(session.adapter), "projection", unsplit)
    failures = check_model(session, lambda text: None)
    assert any(failure.startswith("signal query: shape") for failure in failures), failures


def test_an_adapter_that_finds_no_image_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = _session(folder)
    monkeypatch.setattr(type(session.adapter), "image_mask", lambda self, model, inputs: None)
    failures = check_model(session, lambda text: None)
    assert failures == ["visual tokens found: none in a prompt with a picture"]
