"""The trainer sees exactly what generation sees, learns, and resumes where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from ivcp_eval.lab.tiny import tasks
from ivcp_eval.lab.tiny.processor import build_config, build_processor
from ivcp_eval.lab.tiny.scenes import SIZES, render, sample_scene, scene_rng
from ivcp_eval.lab.tiny.training import batches, train
from ivcp_eval.lab.tiny.training.fast import vision_forward
from ivcp_eval.lab.tiny.training.losses import answer_logits
from ivcp_eval.lab.tiny.training.validation import overlap, parse_box

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_heads": 2,
    "num_layers": 6,
    "intermediate_size": 96,
    "mrope_section": (2, 6, 8),
    "vision_hidden_size": 64,
    "vision_intermediate_size": 96,
    "vision_depth": 2,
    "fullatt_block_indexes": (1,),
}


def _model(**sizes: Any) -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration(build_config(**{**SMALL, **sizes})).eval()


@pytest.mark.parametrize("size", SIZES)
def test_batched_vision_equals_the_stock_tower(size: tuple[int, int]) -> None:
    model, processor = _model(), build_processor()
    batch = batches.make_batch("train", 0, 2, size, (3, 8))
    with torch.no_grad():
        ours = vision_forward(model.model.visual, batch.images)
        pixels = processor.image_processor(
            images=[Image.fromarray(image.numpy()) for image in batch.images], return_tensors="pt"
        )
        stock = model.model.visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
    torch.testing.assert_close(ours.flatten(0, 1), stock, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_packed_questions_equal_single_prompts_through_processor_and_stock_forward(key_value_heads: int) -> None:
    """Every slot's logits against the stock model on the processor's output for that question alone."""
    model, processor = _model(num_key_value_heads=key_value_heads), build_processor()
    size = (308, 392)
    batch = batches.make_batch("train", 5, 2, size, (3, 8))
    with torch.no_grad():
        packed = answer_logits(model, batch, torch.float32)[0]
    rows, labels = [], batch.labels != batches.IGNORED
    rng = scene_rng("train", 6)
    scene = sample_scene(rng, size, (3, 8))
    image = Image.fromarray(render(scene))
    groups = batches.choose_questions(rng, scene)
    assert {q.task for group in groups for q in group} == {"grounding", "mcq", "yes_no", "short"}
    for slot, sample in ((slot, q) for group in groups for slot, q in enumerate(group)):
        prompt = batches.varied_prompt(6 + slot, sample)
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False) + sample.answer
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**inputs).logits[0, -len(batches.encode(sample.answer)) - 1 :])
    ours = packed[int(labels[0].sum()) :]
    torch.testing.assert_close(ours, torch.cat(rows), atol=5e-5, rtol=1e-4)


def test_every_answer_weighs_the_same_whatever_its_length() -> None:
    batch = batches.make_batch("train", 0, 8, SIZES[0], (3, 8))
    end = batches.encode(batches.END)[0]
    weights = torch.where(batch.labels == end, 0.0, batch.weights)
    start = 0
    for (count, length), allowed in zip(batches.SLOTS, ((0, 3), (0, 2, 2.5), (0, 1, 1.5, 2.5)), strict=True):
        for _ in range(count):
            totals = weights[:, start : start + length].sum(1)
            assert all(min(abs(t - a) for a in allowed) < 1e-5 for t in totals.tolist())
            start += length


def test_cell_targets_point_at_the_object_under_the_cell() -> None:
    scene = sample_scene(scene_rng("train", 3), SIZES[0], (3, 8))
    shape, _, boxes, digits = batches.cell_targets(scene)
    columns = scene.width // 28
    for item in scene.objects:
        x, y = item.centre
        cell = int(y) // 28 * columns + int(x) // 28
        plain = tasks.Sample("grounding", "plain", tasks.name_of(item), "", box=item.box)
        looked, counted = batches.look_targets(scene, ([plain], [], []))
        assert looked[0, 1 + cell] == 1
        assert looked[1:].sum() == counted.sum() == 0
        assert tuple(boxes[cell]) == item.box
        assert batches.SHAPE_CLASSES[shape[cell]] == item.shape
        assert [str(d) for d in digits[cell] if d >= 0] == list(item.number)


def _config() -> dict[str, Any]:
    return {
        "seed": 0,
        "compile": False,
        "model": SMALL,
        "muon_lr": 0.01,
        "adam_lr": 0.004,
        "weight_decay": 0.0,
        "log_every": 1,
        "validate_every": 3,
        "save_every": 1000,
        "phases": [
            {"images": 8, "batch": 4, "sizes": [[84, 112]], "objects": [1, 1], "rate": [1.0, 1.0], "vision_only": True},
            {"images": 16, "batch": 4, "sizes": [[84, 112]], "objects": [1, 1], "rate": [1.0, 0.1], "dense": 0.5},
        ],
    }


def test_stopped_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    whole = train.Run(_config(), tmp_path / "whole")
    parts = train.Run(_config(), tmp_path)
    phase = _config()["phases"][1]
    for _ in range(3):
        whole.step(phase, 0, 1)
    parts.step(phase, 0, 1)
    parts.save()
    again = train.Run({**_config(), "seed": 99}, tmp_path)
    assert again.load()
    for _ in range(2):
        again.step(phase, 0, 1)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], value, msg=name)


def test_the_command_trains_all_phases_and_exports_a_loadable_model(tmp_path: Path) -> None:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    config = tmp_path / "tiny.yaml"
    document = _config() | {"model": {k: list(v) if isinstance(v, tuple) else v for k, v in SMALL.items()}}
    config.write_text(yaml.safe_dump(document))
    out = tmp_path / "run"
    threads = torch.get_num_threads()
    train.main(["--out", str(out), "--config", str(config), "--processes", "1"])
    torch.set_num_threads(threads)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in log] == [4, 8, 12, 16, 20, 24]
    assert len((out / "curve.csv").read_text().splitlines()) == 3
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(out / "model")
    assert model.dtype == torch.bfloat16
    assert AutoProcessor.from_pretrained(out / "model").tokenizer.eos_token == "<|im_end|>"


def test_training_overfits_one_batch() -> None:
    run = train.Run(_config(), Path())
    phase = _config()["phases"][1]
    losses = []
    for _ in range(25):
        run.progress |= {"images": 0, "phase_images": 0}
        losses.append(run.step({**phase, "warmup_steps": 1}, 0, 1)["answers"])
    assert losses[-1] < 0.35 * losses[0]


def test_boxes_are_read_and_compared() -> None:
    assert parse_box('{"bbox_2d": [1, 22, 303, 4]}') == (1, 22, 303, 4)
    assert parse_box("no box") is None
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 10, 10), None) == 0
    assert overlap((10, 10, 0, 0), (0, 0, 10, 10)) == 0


def test_questions_look_at_the_objects_they_are_about() -> None:
    seen = set()
    for index in range(40):
        rng = scene_rng("train", index)
        scene = sample_scene(rng, SIZES[0], (3, 8))
        for sample in (q for group in batches.choose_questions(rng, scene) for q in group):
            found = batches.subjects(scene, sample)
            seen.add(sample.category)
            right = sample.options[tasks.LETTERS.index(sample.answer)] if sample.options else sample.answer
            if sample.category == "count":
                assert len(found) == int(right)
                counted = batches.look_targets(scene, ([], [], [sample]))[1][4]
                assert sorted(counted[counted > 0].tolist()) == pytest.approx([1 / (len(found) + 1)] * (len(found) + 1))
            elif sample.answer == "No":
                assert found == []
                assert batches.look_targets(scene, ([], [], [sample]))[0][4].nonzero()[0].tolist() == [0]
            elif sample.category in ("present", "presence"):
                assert len({tasks.name_of(scene.objects[i]) for i in found}) == 1
            else:
                assert len(found) == 1
                item = scene.objects[found[0]]
                assert sample.task == "grounding" or right in (item.colour, item.shape, item.number)
            if sample.task == "mcq":
                question = batches.encode(tasks.build_prompt(sample))
                text = [question[i] for i in batches.option_tokens(question, sample)]
                assert batches.tokenizer().decode(text).strip() == right
    assert {"plain", "relation", "count", "number", "present", "presence", "adversarial"} <= seen


def test_the_wording_says_nothing_about_the_answer() -> None:
    """The same question with another answer is asked in the same words at the same place."""
    wordings = set()
    for answer in tasks.LETTERS:
        sample = tasks.Sample("mcq", "colour", "What colour is the star?", answer, ("red", "blue", "green", "orange"))
        ids, labels, *_ = batches.pack([], [sample], [], salt=3)
        wordings.add(tuple(token for token, label in zip(ids, labels, strict=True) if label == batches.IGNORED))
    assert len(wordings) == 1
