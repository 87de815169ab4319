"""`ivcp calibrate hawk`: weights by the formula, of heads that are really silent, resumed where it stopped."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ivcp_eval.cli import main
from ivcp_eval.interface import models
from ivcp_eval.lab.calibration import heads
from ivcp_eval.lab.calibration.heads import WHOLE, calibrate_heads, head_weights, without_head
from ivcp_eval.lab.calibration.questions import Question, generated
from ivcp_eval.methods.hawk import Method
from ivcp_eval.methods.hawk import head_weights as read_weights
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement


@pytest.fixture(scope="module")
def session() -> Session:
    weights = models.locate("tiny")
    return Session(weights, Placement("cpu").resolve(), replace(Limits.published(weights), max_new_tokens=8))


def test_weights_are_the_mean_of_shifted_shares() -> None:
    accuracies = {
        "first": {WHOLE: 0.9, "0": 0.9, "1": 0.6, "2": 0.8},  # lost 0, .3, .1
        "second": {WHOLE: 0.5, "0": 0.6, "1": 0.5, "2": 0.4},  # lost -.1, 0, .1: shifted 0, .1, .2
        "silent": {WHOLE: 0.5, "0": 0.5, "1": 0.5, "2": 0.5},
    }
    assert head_weights(accuracies, 3) == pytest.approx([0, (0.75 + 1 / 3) / 2, (0.25 + 2 / 3) / 2], abs=1e-5)
    with pytest.raises(ValueError, match="nothing to weigh them by"):
        head_weights({"silent": accuracies["silent"]}, 3)


def test_a_silenced_head_writes_nothing(session: Session) -> None:
    """The same as a model whose output projections read zeros there."""
    asked = generated(1)[0].questions[0]
    inputs = session.adapter.encode(session.processor, [[{"image": asked.image}, {"text": asked.text}]])
    maimed = copy.deepcopy(session.model)
    for number in (1, 4):
        weight = maimed.model.language_model.layers[number].self_attn.o_proj.weight
        weight.data[:, 64:128] = 0
    with torch.inference_mode():
        whole, wanted = session.model(**inputs).logits, maimed(**inputs).logits
        with without_head(session, 1, [1, 4]):
            silent = session.model(**inputs).logits
        assert torch.equal(session.model(**inputs).logits, whole)
    torch.testing.assert_close(silent, wanted)
    assert not torch.allclose(silent, whole, atol=1e-2)


def test_what_was_measured_is_not_measured_again(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answer = session.answer

    def interrupted(parts: Any, *args: Any, **kwargs: Any) -> Any:
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(parts[1]["text"])
        return answer(parts, *args, **kwargs)

    sets, file = generated(2)[:2], tmp_path / "new" / "weights.json"
    monkeypatch.setattr(session, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate_heads(session, sets, file)
    assert not file.exists()
    measured = json.loads(file.with_suffix(".ablation.json").read_text())["accuracy"]
    assert {name: list(heads) for name, heads in measured.items()} == {"tiny_grounding": [WHOLE, "0"]}
    asked[:] = [""] * 100
    lines: list[str] = []
    weights = calibrate_heads(session, sets, file, progress=lines.append)
    assert len(asked) == 100 + 2 * 2 * 4 - 4
    assert lines[-1].startswith("[8/8] tiny_mcq, without head 2")
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert read_weights(file, 3).tolist() == pytest.approx(weights, abs=1e-5)
    asked.clear()
    assert calibrate_heads(session, sets, file) == weights
    assert not asked
    with pytest.raises(ValueError, match="is of other layers, so it cannot be gone on with"):
        calibrate_heads(session, sets, file, layers=[0])
    with pytest.raises(ValueError, match=r"layers \[6\] are not among the model's, 0..5"):
        calibrate_heads(session, sets, tmp_path / "other.json", layers=[6])


def test_unknown_answers_are_those_of_the_whole_model(session: Session) -> None:
    known = generated(1)[1].questions[0]
    unknown = Question(known.image, known.text, None)
    (filled,) = heads.answered(session, [unknown])
    assert filled.answer
    assert heads.accuracy(session, [filled]) == 1


def test_the_command_writes_what_hawk_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "hawk.json"
    assert main(["calibrate", "hawk", "--questions", "1", "--device", "cpu", "--out", str(file)]) == 0
    out = capsys.readouterr().out
    assert "[16/16] tiny_short, without head 2" in out
    assert Method(weights=file).weights == file
    assert sum(json.loads(file.read_text())) == pytest.approx(1, abs=1e-5)
