"""The scene generator and the questions asked about its scenes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from ivcp_eval.lab.tiny import tasks
from ivcp_eval.lab.tiny.scenes import SIZES, render, sample_scene, scene_rng, shape_mask

SCENES = [sample_scene(scene_rng("validation", index)) for index in range(60)]


def test_same_seed_same_pixels_on_every_machine() -> None:
    digest = hashlib.sha256()
    for scene in SCENES[:10]:
        digest.update(render(scene).tobytes())
    assert digest.hexdigest() == "23ced97a7b5cde005e5031358bb05f60f35998393aa438ba91e8c700f080c37a"


def test_splits_and_indices_differ() -> None:
    draws = {split: sample_scene(scene_rng(split, 7)) for split in ("train", "validation", "test")}
    assert draws["train"] != draws["validation"] != draws["test"] != draws["train"]
    assert sample_scene(scene_rng("test", 8)) != draws["test"]


def test_every_size_has_at_least_144_visual_tokens_and_is_never_resized() -> None:
    for width, height in SIZES:
        assert width % 28 == height % 28 == 0
        assert width * height // 28**2 >= 144


@pytest.mark.parametrize("scene", SCENES[:30])
def test_boxes_are_tight_apart_and_inside(scene) -> None:  # type: ignore[no-untyped-def]
    for number, item in enumerate(scene.objects):
        x1, y1, x2, y2 = item.box
        assert 0 < x1 < x2 < scene.width
        assert 0 < y1 < y2 < scene.height
        if item.shape != "sign":
            mask = shape_mask(item.shape, x2 - x1, y2 - y1)
            # A curve or a tip may miss the centres of the outermost pixels.
            assert mask[:3].any()
            assert mask[-3:].any()
            assert mask[:, :3].any()
            assert mask[:, -3:].any()
        for other in scene.objects[number + 1 :]:
            apart_x = other.box[0] >= x2 or x1 >= other.box[2]
            apart_y = other.box[1] >= y2 or y1 >= other.box[3]
            assert apart_x or apart_y


def test_the_drawn_object_fills_its_box_and_nothing_else() -> None:
    scene = next(s for s in SCENES if s.shapes)
    item = scene.shapes[0]
    without = type(scene)(
        scene.width, scene.height, scene.background, scene.strokes, tuple(o for o in scene.objects if o is not item)
    )
    changed = (render(scene) != render(without)).any(-1)
    rows, columns = np.nonzero(changed)
    drawn = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.subtract(drawn, item.box)).max() <= 1
    assert drawn[0] >= item.box[0]
    assert drawn[3] <= item.box[3]


def test_plain_references_name_one_object() -> None:
    for scene in SCENES:
        names = [tasks.name_of(o) for o in scene.objects]
        for sample in tasks.plain_references(scene):
            assert names.count(sample.question) == 1
            assert sample.box == scene.objects[names.index(sample.question)].box


def test_relations_hold_for_the_target_and_fail_for_its_equals() -> None:
    seen = 0
    for scene in SCENES:
        for sample in tasks.relation_references(scene):
            relation = next(r for r in tasks.RELATIONS if f" {r} the " in sample.question)
            name, anchor_name = sample.question.split(f" {relation} the ")
            anchors = [o for o in scene.objects if tasks.name_of(o) == anchor_name]
            equals = [o for o in scene.objects if tasks.name_of(o) == name]
            assert len(anchors) == 1
            assert len(equals) > 1
            holding = [o for o in equals if tasks.holds(relation, o, anchors[0], 0)]
            assert [o.box for o in holding] == [sample.box]
            seen += 1
    assert seen > 20


def test_answers_follow_from_the_scene() -> None:
    for number, scene in enumerate(SCENES):
        rng = scene_rng("validation", 10_000 + number)
        present = {tasks.name_of(o) for o in scene.shapes}
        yes_no = tasks.yes_no_question(rng, scene)
        if yes_no:
            name = yes_no.question.removeprefix("Is there a").removeprefix("n").split(" in the image")[0].strip()
            assert (yes_no.answer == "Yes") == (name in present)
        for category in tasks.MCQ_CATEGORIES:
            sample = tasks.mcq_question(rng, scene, category)
            if sample is None:
                continue
            assert len(set(sample.options)) == 4
            right = sample.options[tasks.LETTERS.index(sample.answer)]
            if category == "presence":
                assert [o for o in sample.options if o in present] == [right]
        count = tasks.count_question(rng, scene)
        if count:
            text, answer = count
            shapes = [o.shape for o in scene.shapes if f" {o.shape}" in text]
            colours = [o.colour for o in scene.shapes if f" {o.colour} " in text]
            assert len(shapes or colours) == int(answer)


def test_prompts_are_those_of_the_benchmarks() -> None:
    mcq = tasks.Sample("mcq", "colour", "What colour is the star?", "B", ("red", "blue", "green", "orange"))
    assert tasks.build_prompt(mcq) == (
        "Question: What colour is the star?\nOptions:\nA. red\nB. blue\nC. green\nD. orange\n"
        "Please select the correct answer from the options above. \n"
    )
    box = tasks.Sample("grounding", "plain", "red circle", "", box=(1, 2, 30, 140))
    assert tasks.build_prompt(box) == "Locate red circle and output the bbox coordinates in JSON format."
    assert tasks.format_box((1, 2, 30, 140)) == '{"bbox_2d": [1, 2, 30, 140]}'
    short = tasks.Sample("short", "count", "How many rings are in the image?", "2")
    assert tasks.build_prompt(short).endswith("image?\nAnswer the question using a single word or phrase.")
