"""Labels are searched for once and survive a kill; the compressor learns from them; the method keeps its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ivcp_eval.engine import prune
from ivcp_eval.files import DamagedError
from ivcp_eval.lab.training.examples import Generated
from ivcp_eval.lab.training.frozen import Encoded, Frozen
from ivcp_eval.lab.training.part import default_config
from ivcp_eval.lab.training.parts import evocomp
from ivcp_eval.lab.training.parts.evocomp import LABELS, Part, ghm, likeness
from ivcp_eval.lab.training_log import write_tensors

OPTIONS: dict[str, Any] = {
    **yaml.safe_load(default_config("evocomp").read_text())["part"],
    "search": {"population": 4, "parents": 2, "generations": 1},
}
EXAMPLES = Generated("tiny", ["box"])


def started(frozen: Frozen, example: Encoded, folder: Path, **options: Any) -> Part:
    part = Part(frozen, {**OPTIONS, **options}, example)
    part.prepare(EXAMPLES, folder, lambda text: None)
    return part


def test_a_label_is_searched_for_once(
    frozen: Frozen, boxes: list[Encoded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = started(frozen, boxes[0], tmp_path)
    kept = first.label(boxes[0], first.answered(boxes[0]))
    assert kept.numel() == sum(image.budget for image in first.answered(boxes[0]).images(OPTIONS["ratio"]))
    written = (tmp_path / LABELS).read_bytes()
    (tmp_path / LABELS).write_bytes(written + b'{"key": "torn')  # killed while it wrote
    monkeypatch.setattr(evocomp, "search", lambda *_: pytest.fail("searched again"))
    second = started(frozen, boxes[0], tmp_path)
    assert second.label(boxes[0], second.answered(boxes[0])).equal(kept)
    assert (tmp_path / LABELS).read_bytes() == written
    other = started(frozen, boxes[0], tmp_path, ratio=0.5)
    with pytest.raises(pytest.fail.Exception, match="searched again"):
        other.label(boxes[0], other.answered(boxes[0]))


def test_a_label_is_the_same_wherever_it_is_searched_for(frozen: Frozen, boxes: list[Encoded], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    one, other = started(frozen, boxes[0], tmp_path), started(frozen, boxes[1], tmp_path / "other")
    first = one.label(boxes[1], one.answered(boxes[1]))
    other.label(boxes[0], other.answered(boxes[0]))
    assert other.label(boxes[1], other.answered(boxes[1])).equal(first)


def test_labels_that_were_changed_are_refused(frozen: Frozen, boxes: list[Encoded], tmp_path: Path) -> None:
    part = started(frozen, boxes[0], tmp_path)
    part.label(boxes[0], part.answered(boxes[0]))
    file = tmp_path / LABELS
    file.write_bytes(file.read_bytes().replace(b'"subset": [', b'"subset": [0, '))
    with pytest.raises(DamagedError, match=r"changed since .* searched for again"):
        started(frozen, boxes[0], tmp_path)


def test_the_compressor_learns_a_label(frozen: Frozen, boxes: list[Encoded], tmp_path: Path) -> None:
    part = started(frozen, boxes[0], tmp_path)
    optimizer = torch.optim.Adam(part.net.parameters(), lr=3e-3)
    found = []
    for _ in range(24):
        loss, figures = part.loss(boxes[0], np.random.default_rng(0), 0.0)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.net.parameters())
        optimizer.step()
        found.append(figures["found"])
    assert found[-1] > found[0] + 0.2
    assert all(p.grad is None for p in frozen.model.parameters())


def test_the_method_keeps_what_the_part_would(frozen: Frozen, boxes: list[Encoded], tmp_path: Path) -> None:
    part, example = started(frozen, boxes[0], tmp_path), boxes[0]
    file, total = tmp_path / "weights.safetensors", example.inputs["input_ids"].shape
    write_tensors(file, part.net.state_dict(), {"part": "evocomp"})
    prompt = {n: v[:, : example.prompt] if v.shape == total else v for n, v in example.inputs.items()}
    with torch.no_grad(), prune(frozen.model, "evocomp", 0.25, weights=file) as run:
        frozen.model(**prompt, use_cache=False)
    answered = part.answered(example)
    (image,) = answered.images(0.25)
    where, words = evocomp.places(image).float(), answered.hidden[0, answered.question]
    with torch.no_grad():
        logits, _ = part.net(answered.embeddings, words, where)
    kept = answered.visual[logits.topk(image.budget).indices].sort().values
    assert run.kept[0][torch.isin(run.kept[0], answered.visual)].equal(kept)


def test_the_weights_of_another_part_are_refused(frozen: Frozen, boxes: list[Encoded], tmp_path: Path) -> None:
    part, file = started(frozen, boxes[0], tmp_path), tmp_path / "weights.safetensors"
    write_tensors(file, part.net.state_dict(), {"part": "learnpruner"})
    with pytest.raises(ValueError, match="learnpruner"), prune(frozen.model, "evocomp", 0.25, weights=file):
        frozen.logits(boxes[0])


def test_ghm_weighs_every_length_of_gradient_alike() -> None:
    logits, target = torch.tensor([-6.0, -6.0, -6.0, 0.1]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    single = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    assert ghm(logits, target, 10) == pytest.approx(float((single[:3].mean() + single[3]) / 2))


def test_likeness_is_a_cosine_of_means() -> None:
    states = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    assert likeness(states, torch.tensor([1.0, 1.0, 0.0])) == 0
    assert likeness(states, torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(3 / 13**0.5)
    assert likeness(states, torch.ones(3)) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"search": {"populaton": 4}}, "populaton; it knows population"),
        ({"ratio": 1.5}, "outside"),
        ({"states": 10}, "multiple of the 4 heads"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    frozen: Frozen, boxes: list[Encoded], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Part(frozen, {**OPTIONS, **given}, boxes[0])
