"""The trainer learns, resumes exactly where it stopped, and exports the model it trained."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ivcp_eval.lab.tiny.training.average import averaged
from ivcp_eval.lab.tiny.training.fast import merge, tower_features
from ivcp_eval.lab.tiny2 import clips, tasks
from ivcp_eval.lab.tiny2.processor import build_processor, build_tokenizer, coordinate_ids
from ivcp_eval.lab.tiny2.training import batches, train
from ivcp_eval.lab.tiny2.training import clips as training_clips
from ivcp_eval.lab.tiny2.training.state import STATE, TOWER
from ivcp_eval.lab.tiny2.training.validation import means, score

CONFIGS = Path(train.__file__).parent
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "num_layers": 4,
    "intermediate_size": 96,
    "mrope_section": [2, 4, 10],
    "vision_hidden_size": 64,
    "vision_intermediate_size": 96,
    "vision_depth": 2,
    "fullatt_block_indexes": [1],
}
CONFIG: dict[str, Any] = {
    "seed": 0,
    "compile": False,
    "workers": 0,
    "visual_gain": 0.2,
    "model": SMALL,
    "muon_lr": 0.004,
    "adam_lr": 0.002,
    "weight_decay": 0.02,
    "log_every": 1,
    "validate_every": 4,
    "save_every": 1e9,
    "phases": [
        {"kind": "tower", "images": 16, "batch": 8, "sizes": [[96, 96]], "objects": [1, 2], "rate": [1.0, 0.5]},
        {
            "kind": "text",
            "images": 16,
            "batch": 4,
            "layers": 2,
            "sizes": [[96, 96], [64, 128]],
            "objects": [1, 1],
            "rate": [1.0, 1.0],
            "groups": [{"tokens": 40, "kinds": ["list"]}, {"tokens": 30, "kinds": ["box", "inverse", "shape"]}],
        },
    ],
}


def _run(folder: Path, config: dict[str, Any], minutes: float = float("inf")) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert train.run(argparse.Namespace(config=path, out=folder, minutes=minutes)) == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    _run(folder, CONFIG)
    return folder


@pytest.mark.parametrize("kind", ["tower", "text"])
def test_training_lowers_the_loss(kind: str, tmp_path: Path) -> None:
    """Ten steps on one batch."""
    run = train.Run(CONFIG, tmp_path)
    phase = {**CONFIG["phases"][kind == "text"], "images": 1000, "warmup_steps": 1}
    make: Any = batches.make_text_batch if kind == "text" else batches.make_tower_batch
    batch = make("train", 0, 4, (96, 96), phase)
    train.freeze(run, phase)
    losses = [run.step(batch, phase)["loss"].item() for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]


PARTS: dict[str, Any] = {
    "kind": "text",
    "images": 24,
    "batch": 4,
    "tower_rate": 0.1,
    "objects": [1, 1],
    "rate": [1.0, 1.0],
    "parts": [
        {"name": "one", "sizes": [[96, 96], [64, 128]], "groups": [{"tokens": 30, "kinds": ["box"]}]},
        {"name": "clip", "clips": ["order", "covered"], "groups": [{"tokens": 90, "kinds": ["choice", "choice"]}]},
        {"name": "two", "sizes": [[64, 64]], "pictures": 2, "groups": [{"tokens": 30, "kinds": ["box"]}]},
    ],
}


def test_parts_of_a_phase_take_turns_and_are_validated_by_name(tmp_path: Path) -> None:
    made = train.Batches(PARTS, 8)
    shapes = [tuple(made[number].images.shape[1:]) for number in range(6)]
    clip, two = (8, 112, 112, 3), (2, 64, 64, 3)
    assert shapes == [(1, 96, 96, 3), clip, two, (1, 128, 64, 3), clip, two]
    _run(tmp_path, {**CONFIG, "phases": [PARTS], "validate_every": 6})
    with (tmp_path / "text_accuracy.csv").open() as handle:
        (row,) = csv.DictReader(handle)
    assert {"one_grounding_plain", "clip_mcq_clip", "two_grounding_plain"} <= set(row)


def test_a_part_cannot_set_what_the_phase_counts_by() -> None:
    parts = [{"name": "one", "batch": 2, "rate": [1, 1]}]
    with pytest.raises(ValueError, match="phase 0: one of its parts sets batch, rate; set that for the whole phase"):
        train.check_phases({"phases": [{**PARTS, "parts": parts}]}, 4)


@pytest.mark.parametrize("category", sorted(clips.TASKS))
def test_choices_about_training_clips_name_the_right_option_in_every_order(category: str) -> None:
    """The letter follows the option, so no letter is right more often than chance, and the list says what is seen."""
    phase = {"clips": [category], "groups": [{"tokens": 200, "kinds": ["list", "choice"]}]}
    samples = training_clips.make_clip_batch("train", 0, 60, phase).samples
    letters = {row[1].answer for row in samples if row[1]}
    assert len(letters) == len(samples[0][1].options)  # type: ignore[union-attr]
    if category == "order":
        for shown, asked in samples:
            assert shown is not None
            assert asked is not None
            names = [line.split("{")[0] for line in shown.answer.split("\n")]
            before = next(name for name in names if f"right after the {name}?" in asked.question)
            right = asked.options["ABC".index(asked.answer)]
            assert names[(names.index(before) + 1) % len(names)] == right


def test_repeating_the_question_is_no_right_box() -> None:
    """An untrained model with tied embeddings says its last input token again."""
    phase = CONFIG["phases"][1]
    batch = batches.make_text_batch("validation", 0, 4, (96, 96), phase)
    hits: dict[str, list[float]] = {}
    score(hits, batch, batch.labels)
    assert means(hits)["grounding_plain"] == means(hits)["list"] == 1
    repeated = batch.ids[:, batch.layout.prefix :].masked_fill(batch.labels == batches.IGNORED, batches.IGNORED)
    hits.clear()
    score(hits, batch, repeated)
    assert means(hits)["grounding_plain"] == means(hits)["list"] == 0


def test_resuming_after_every_step_ends_in_the_same_weights(whole: Path, tmp_path: Path) -> None:
    """Stopped after each step, even between the phases: same weights, optimizers, curve, to the bit."""
    for _ in range(20):
        _run(tmp_path, CONFIG, minutes=0)
        if (tmp_path / "model").exists():
            break
    first, second = load_file(whole / STATE), load_file(tmp_path / STATE)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert (whole / TOWER).read_bytes() == (tmp_path / TOWER).read_bytes()
    steps = [[r["steps"] for r in csv.DictReader((f / "text_loss.csv").open())] for f in (whole, tmp_path)]
    assert steps[0] == steps[1] == [str(n) for n in range(3, 7)]


def test_a_crash_while_saving_leaves_the_old_state(whole: Path, tmp_path: Path) -> None:
    """What a killed writer leaves behind is never read."""
    for name in (STATE, TOWER):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    (tmp_path / "state.tmp").write_bytes(b"half a file")
    run = train.Run(CONFIG, tmp_path)
    assert run.state.load()
    assert run.state.progress["phase"] == 2


def test_state_of_another_model_is_refused(whole: Path) -> None:
    run = train.Run({**CONFIG, "model": {**SMALL, "num_layers": 3}}, whole)
    with pytest.raises(ValueError, match="state of another model"):
        run.state.load()


def test_a_run_starts_from_the_weights_of_another(whole: Path, tmp_path: Path) -> None:
    """The average of the other run, its heads, and no progress; silent layers stay as they are."""
    run = train.Run({**CONFIG, "start": str(whole / STATE)}, tmp_path)
    assert not train.train(run, 0)
    assert run.state.progress["steps"] == 1
    other = train.Run(CONFIG, whole)
    other.state.load()
    with averaged(other.state.model, other.state.average):
        before = [p.clone() for p in other.state.model.parameters()]
    moved = [(a - b).abs().max().item() for a, b in zip(run.state.model.parameters(), before, strict=True)]
    assert 0 < max(moved) < 0.1


def test_an_exported_model_can_be_gone_on_from(whole: Path, tmp_path: Path) -> None:
    run = train.Run({**CONFIG, "model": {**SMALL, "num_layers": 2}}, tmp_path)
    run.state.load_weights(whole / "model")
    made = type(run.state.model).from_pretrained(whole / "model", dtype=torch.float32)
    for average, saved in zip(run.state.average, made.parameters(), strict=True):
        assert torch.equal(average, saved)


def test_a_start_of_another_shape_is_refused(whole: Path, tmp_path: Path) -> None:
    config = {**CONFIG, "model": {**SMALL, "num_layers": 3}, "start": str(whole / STATE)}
    with pytest.raises(ValueError, match="state of another model"):
        train.train(train.Run(config, tmp_path), 0)


def test_the_export_holds_the_trained_layers_and_computes_the_same(whole: Path) -> None:
    """Two of four layers were trained; the others pass their input on, so a model without them says the same."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    short = Qwen2_5_VLForConditionalGeneration.from_pretrained(whole / "model", dtype=torch.float32).eval()
    assert short.config.text_config.num_hidden_layers == len(short.model.language_model.layers) == 2
    run = train.Run(CONFIG, whole)
    run.state.load()
    ids = torch.arange(20, 32)[None]
    with averaged(run.state.model, run.state.average), torch.no_grad():
        for parameter in run.state.model.parameters():
            parameter.copy_(parameter.bfloat16().float())
        torch.testing.assert_close(short(input_ids=ids).logits, run.state.model(input_ids=ids).logits)


def test_near_coordinates_cost_less(whole: Path) -> None:
    ids = coordinate_ids()
    logits = torch.zeros(3, build_tokenizer().get_vocab_size())
    for row, said in enumerate((10, 11, 14)):
        logits[row, ids[said]] = 9.0
    right, near, far = train.answer_losses(logits, torch.tensor([ids[10]] * 3)).tolist()
    assert right < near < far


def test_the_export_loads_with_stock_classes(whole: Path) -> None:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(whole / "model", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(whole / "model")
    assert processor.tokenizer.get_vocab() == build_processor().tokenizer.get_vocab()
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_layers_that_do_not_take_part_yet_change_nothing_when_they_join(whole: Path, tmp_path: Path) -> None:
    (tmp_path / TOWER).write_bytes((whole / TOWER).read_bytes())
    run = train.Run({**CONFIG, "tower": str(tmp_path / TOWER)}, tmp_path)
    phase = CONFIG["phases"][1]
    run.dtype = torch.float32
    run.state.load_tower(tmp_path / TOWER)
    train.begin_text(run, phase)
    batch = batches.make_text_batch("train", 0, 2, (96, 96), phase)
    with torch.no_grad():
        few, all_of_them = run.answer_logits(batch, phase), run.answer_logits(batch, {**phase, "layers": None})
    torch.testing.assert_close(few, all_of_them)


def test_decoder_phases_leave_the_tower_alone(whole: Path) -> None:
    """Only the merger learns on: the blocks are those that the pre-training left."""
    tower, state = load_file(whole / TOWER), load_file(whole / STATE)
    blocks = [k for k in tower if ".blocks." in k or ".patch_embed." in k]
    assert len(blocks) > 10
    assert all(torch.equal(tower[k], state[f"model.{k}"]) for k in blocks)
    assert not torch.equal(tower["model.visual.merger.mlp.0.weight"], state["model.model.visual.merger.mlp.0.weight"])


def test_a_resumed_run_keeps_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one is faster is timed by every process, and a busy machine may time otherwise."""
    monkeypatch.setattr(train, "choose_dtype", lambda device: torch.bfloat16)
    first = train.Run(CONFIG, tmp_path)
    train.train(first, 0)
    monkeypatch.setattr(train, "choose_dtype", lambda device: torch.float32)
    second = train.Run(CONFIG, tmp_path)
    train.train(second, 0)
    assert (first.dtype, second.dtype) == (torch.bfloat16, torch.bfloat16)
    assert second.state.progress["steps"] > first.state.progress["steps"] > 0


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_shipped_configurations_run_with_tiny_shapes(name: str, tmp_path: Path) -> None:
    """Every phase of the configuration takes a step: its sizes, questions and options are good."""
    config = yaml.safe_load((CONFIGS / name).read_text())

    def small(phase: dict[str, Any]) -> dict[str, Any]:
        return {**phase, "sizes": phase["sizes"][-1:]} if "sizes" in phase else phase

    phases = [{**small(p), "images": 2 * len(p.get("parts", "1")), "batch": 2} for p in config["phases"]]
    phases = [{**p, "parts": [small(part) for part in p["parts"]]} if "parts" in p else p for p in phases]
    model = {**SMALL, "num_layers": config["model"].get("num_layers", 12)}  # smaller heads, so other rotary sections
    _run(tmp_path, {**config, "model": model, "compile": False, "workers": 0, "validate_every": 999, "phases": phases})
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_slots_of_the_shipped_configurations_hold_the_longest_box_question(name: str) -> None:
    """The longest name and the picture it is in: a slot too short would end a run only after an hour."""
    question = "purple triangle"
    phases = yaml.safe_load((CONFIGS / name).read_text())["phases"]
    for part in [part for phase in phases for part in phase.get("parts", [phase])]:
        for group in part.get("groups", []):
            if "box" in group["kinds"]:
                picture = 2 if part.get("pictures", 1) > 1 else 0
                box = (100, 100, 200, 200)
                sample = tasks.Sample("grounding", "plain", question, tasks.format_box(box), (), box, picture)
                batches.pack([[sample]], ((1, group["tokens"]),))


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_layers_of_the_shipped_configurations_only_join(name: str) -> None:
    config = yaml.safe_load((CONFIGS / name).read_text())
    train.check_phases(config, config["model"].get("num_layers", 12))


def test_layers_that_drop_out_again_are_refused() -> None:
    phases = [{"kind": "text", "layers": count} for count in (4, 8)]
    with pytest.raises(ValueError, match=r"leaves out decoder layers \[4, 7\]"):
        train.check_phases({"phases": phases}, 12)


def test_tower_knows_no_place() -> None:
    """Equal cells are equal tokens wherever they lie: without content to lean on, the tower has no coordinates."""
    run = train.Run(CONFIG, Path())
    images = torch.arange(768).remainder(255).to(torch.uint8).view(1, 16, 16, 3).repeat(1, 4, 4, 1)
    visual = run.state.model.model.visual
    with torch.no_grad():
        tokens = merge(visual, tower_features(visual, images, torch.float32))[0]
    torch.testing.assert_close(tokens, tokens[:1].expand_as(tokens), atol=1e-3, rtol=0)
