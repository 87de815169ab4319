"""`ivcp calibrate quota`: the published statistic of what really enters each layer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ivcp_eval.cli import main
from ivcp_eval.interface import ModelFacts, models
from ivcp_eval.interface.registry import make_method
from ivcp_eval.lab.calibration.layers import calibrate_layers
from ivcp_eval.lab.calibration.questions import generated
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement


def test_medians_of_what_enters_each_layer(tmp_path: Path) -> None:
    weights = models.locate("tiny")
    session = Session(weights, Placement("cpu").resolve(), replace(Limits.published(weights), max_new_tokens=2))
    sets = generated(2)[:2]
    numbers = calibrate_layers(session, sets, tmp_path / "new" / "layers.json")
    found: list[list[float]] = []
    for one in sets:
        for question in one.questions:
            inputs = session.adapter.encode(session.processor, [[{"image": question.image}, {"text": question.text}]])
            with torch.inference_mode():
                entering = session.model(**inputs, output_hidden_states=True).hidden_states[:-1]
            found.append([])
            for states in entering:
                x = states[0].double()
                scale = x.abs().amax(dim=1, keepdim=True) / 7
                found[-1].append(float(((x / scale).round() * scale - x).norm() / (x.norm() + 1e-6)))
    assert len(found) == 4
    assert numbers == pytest.approx(torch.tensor(found).quantile(0.5, dim=0).tolist(), abs=2e-3)
    assert json.loads((tmp_path / "new" / "layers.json").read_text()) == numbers
    assert set(json.loads((tmp_path / "new" / "layers.made.json").read_text())["questions"]) == {s.name for s in sets}
    cuts = make_method("quota", {"sensitivity": tmp_path / "new" / "layers.json"}).cuts(ModelFacts("x", 6), 0.5)
    assert cuts[-1].ratio == 0.5


def test_what_is_hawks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "quota", "--layers", "1"]) == 2
    assert "--layers is for hawk" in capsys.readouterr().err
