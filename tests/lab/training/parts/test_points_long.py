"""A model with a second, small set of visual tokens: from the command to answers in both modes, and what it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ivcp_eval.interface import models
from ivcp_eval.interface.variants import Variant
from ivcp_eval.lab.training.command import configuration, train
from ivcp_eval.lab.training.examples import Generated
from ivcp_eval.lab.training.frozen import Example, Frozen
from ivcp_eval.lab.training.parts.points_long import Part, showing
from ivcp_eval.runs.planning.placement import Placement
from model_adapters.qwen2_5_vl_points.memory import Memory

SHORT = {"steps": 2, "batch": 1, "log_every": 1, "validate_every": 2, "validation": 1, "kinds": ["box"]}
QUESTION = {"text": "What colour is the square?"}


def picture(number: int, size: tuple[int, int] = (224, 224)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def clip(frames: int) -> dict[str, Any]:
    shown = np.random.default_rng(5).integers(0, 255, (frames, 112, 112, 3), dtype=np.uint8)
    return {"video": shown, "seconds": [0.5 * number for number in range(frames)]}


@pytest.fixture(scope="module")
def part(frozen: Frozen) -> Part:
    options = configuration("points_long", None)["part"]
    return Part(frozen, options, frozen.encoded(Generated("tiny", ["box"]).training(0)))


@pytest.fixture(scope="module")
def trained(frozen: Frozen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("points") / "out"
    before = {name: value.clone() for name, value in frozen.model.state_dict().items()}
    assert train("points_long", frozen, {**configuration("points_long", None), **SHORT}, None, out) is not None
    assert all(torch.equal(value, before[name]) for name, value in frozen.model.state_dict().items())
    return out


@pytest.fixture(scope="module")
def modes(trained: Path) -> dict[str, Frozen]:
    """What the training left, as `ivcp eval` loads it."""
    place = Placement("cpu", "float32", "sdpa")
    return {
        "focus": Frozen(models.locate("points_long", trained / "focus"), place),
        "standby": Frozen(models.locate("points_long_standby", trained / "standby"), place),
    }


def test_both_modes_are_one_file_of_weights(frozen: Frozen, trained: Path) -> None:
    """Each has its own revision; what is not trained stays, to the bit."""
    paths = [trained / mode / "model.safetensors" for mode in ("focus", "standby")]
    assert paths[0].samefile(paths[1])
    revisions = {models.locate("points_long", trained / mode).revision for mode in ("focus", "standby")}
    assert len(revisions) == 2
    made, base = load_file(paths[0]), frozen.model.state_dict()
    learnt = load_file(trained / "points_long_tiny.safetensors")
    assert {name.split(".")[0] for name in learnt} == {"standby", "decoder"}
    changed = {n for n, v in made.items() if n in base and not torch.equal(v, base[n].to(v.dtype))}
    assert changed
    assert all(name.startswith("model.language_model.layers.") for name in changed)
    assert {n for n in made if n not in base} == {
        f"model.visual.{name}" for name in learnt if name.startswith("standby")
    }


def test_a_run_stopped_before_the_decoder_learns_ends_as_one_that_was_not(
    frozen: Frozen, trained: Path, tmp_path: Path
) -> None:
    """The optimizer has then met the small set's weights alone."""
    config = {**configuration("points_long", None), **SHORT}
    assert train("points_long", frozen, config, None, tmp_path, seconds=0) is None
    weights = train("points_long", frozen, config, None, tmp_path)
    assert weights is not None
    ends, wanted = load_file(weights), load_file(trained / weights.name)
    assert set(ends) == set(wanted)
    assert all(torch.equal(value, wanted[name]) for name, value in ends.items())


def test_either_set_answers(modes: dict[str, Frozen]) -> None:
    """Pictures of several sizes, clips and text between them; the few are 16 a picture and 16 a step of two frames."""
    parts = ({"image": picture(0)}, {"image": picture(1, (140, 84))}, clip(6), QUESTION)
    answers = {mode: model.session.answer(parts, Variant("", "none", 1.0)) for mode, model in modes.items()}
    assert answers["focus"].visual_tokens == 64 + 15 + 3 * 16
    assert answers["standby"].visual_tokens == 16 + 12 + 3 * 16
    pruned = modes["standby"].session.answer(parts, Variant("", "uniform", 0.5))
    assert (pruned.visual_tokens, pruned.visual_kept) == (76, 38)


def test_a_batch_answers_as_its_rows_do(modes: dict[str, Frozen]) -> None:
    """Rows of unequal length are padded on the left."""
    session = modes["standby"].session
    conversations = [[{"image": picture(0)}, QUESTION], [{"image": picture(1, (140, 84))}, {"text": "What?"}]]
    together = session.adapter.encode(session.processor, conversations)
    for row, conversation in enumerate(conversations):
        alone = session.adapter.encode(session.processor, [conversation])
        n = alone["input_ids"].shape[1]
        assert together["input_ids"][row, -n:].tolist() == alone["input_ids"][0].tolist()
        assert together["attention_mask"][row].sum() == n
        assert together["mm_token_type_ids"][row, -n:].tolist() == alone["mm_token_type_ids"][0].tolist()
    shown = (together["mm_token_type_ids"] == 1).sum(1)
    assert shown.tolist() == [16, 12]


def test_a_prompt_whose_large_set_was_dropped_is_answered_as_one_of_the_small_set(modes: dict[str, Frozen]) -> None:
    """The words, by way of processor, generate and `Memory`."""
    session = modes["standby"].session
    adapter, processor, model = session.adapter, session.processor, session.model
    conversation = [{"image": picture(0)}, clip(4), QUESTION]
    wanted = session.answer(tuple(conversation), Variant("", "none", 1.0)).prediction
    adapter.switch(model, processor, "both")
    try:
        memory = Memory(model)
        question = memory.see(adapter.encode(processor, [conversation]))
        assert memory.full.sum() == 64 + 2 * 16
        memory.detach()
        said = processor.tokenizer.decode(memory.answer(question), skip_special_tokens=True).strip()
    finally:
        adapter.switch(model, processor, "standby")
    assert said
    assert wanted.startswith(said)  # which stops earlier


def test_downsample_only_where_all_tokens_are_shown(modes: dict[str, Frozen]) -> None:
    sizes = {m: f.session.adapter.shrunk_size(f.session.processor, (224, 224), 0.25) for m, f in modes.items()}
    assert sizes == {"focus": (112, 112), "standby": None}


def test_the_decoder_waits_and_learns_from_both_sets(part: Part) -> None:
    pair, rng = part.encoded(Generated("tiny", ["box"]).training(0)), np.random.default_rng(0)
    _, alone = part.loss(pair, rng, 0.0)
    assert set(alone) == {"answer", "teacher"}
    loss, figures = part.loss(pair, rng, 0.5)
    assert figures["focus"] == pytest.approx(0, abs=1e-6)  # it is the whole model still
    for waits in (True, False):
        part.net.zero_grad(set_to_none=True)
        part.loss(pair, rng, 0.0 if waits else 0.5)[0].backward()
        reached = {n.split(".")[0] for n, p in part.net.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == ({"standby"} if waits else {"standby", "decoder"})
    part.net.zero_grad(set_to_none=True)
    assert loss.item() > 0


def test_training_lowers_the_loss_of_a_picture_and_of_a_clip(part: Part) -> None:
    examples = [Generated("tiny", ["box"]).training(0), Example((clip(4), QUESTION), "red")]
    before, rng = {name: value.clone() for name, value in part.net.state_dict().items()}, np.random.default_rng(0)
    for example in examples:
        pair = part.encoded(example)
        first = part.loss(pair, rng, 0.5)[0].item()
        optimizer = torch.optim.SGD(part.groups(), lr=0.002)
        for _ in range(3):
            loss, _ = part.loss(pair, rng, 0.5)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(part.net.parameters(), 1.0)
            optimizer.step()
        assert part.loss(pair, rng, 0.5)[0].item() < first
        part.net.load_state_dict(before)


def test_with_its_decoder_left_alone_focus_is_the_whole_model(frozen: Frozen) -> None:
    options = {**configuration("points_long", None)["part"], "decoder": 0}
    example = frozen.encoded(Generated("tiny", ["box"]).training(0))
    part = Part(frozen, options, example)
    assert set(dict(part.net.named_children())) == {"standby"}
    with torch.no_grad(), showing(part.student.model, "focus"):
        assert torch.equal(part.student.logits(example), frozen.logits(example))


def test_in_half_precision_the_trained_weights_are_whole() -> None:
    half = Frozen(models.locate("tiny"), Placement("cpu", "bfloat16", "sdpa"))
    example = Generated("tiny", ["box"]).training(0)
    part = Part(half, configuration("points_long", None)["part"], half.encoded(example))
    part.loss(part.encoded(example), np.random.default_rng(0), 0.5)[0].backward()
    assert {parameter.dtype for parameter in part.net.parameters()} == {torch.float32}
    others = [parameter for parameter in part.student.model.parameters() if not parameter.requires_grad]
    assert others
    assert all(parameter.dtype == torch.bfloat16 for parameter in others)


def test_clips_of_the_benchmark_s_kinds_come_from_training_scenes() -> None:
    """Eight pictures of two frames each, half a second a picture, and a letter for an answer."""
    example = Generated("tiny2", ["event"]).training(0)
    video, question = example.parts
    assert video["video"].shape == (16, 112, 112, 3)
    assert video["seconds"] == [0.25 * number for number in range(16)]
    assert np.array_equal(video["video"][0::2], video["video"][1::2])
    assert example.answer in "ABCD"
    assert "A. " in question["text"]


def test_only_the_family_that_it_is_made_of(frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen.model.config, "model_type", "llava")
    with pytest.raises(ValueError, match=r"points_long is made of a model of the family qwen2_5_vl .* is of llava"):
        Part(frozen, configuration("points_long", None)["part"], None)  # type: ignore[arg-type]
