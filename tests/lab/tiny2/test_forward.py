"""The trainer sees exactly what generation sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ivcp_eval.lab.tiny.training.fast import merge, tower_features
from ivcp_eval.lab.tiny2 import clips, tasks
from ivcp_eval.lab.tiny2.processor import build_config, build_processor
from ivcp_eval.lab.tiny2.training import batches
from ivcp_eval.lab.tiny2.training import clips as training_clips
from ivcp_eval.lab.tiny2.training.decoder import decode

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_heads": 2,
    "num_key_value_heads": 1,
    "num_layers": 3,
    "intermediate_size": 96,
    "mrope_section": (2, 4, 10),
    "vision_hidden_size": 64,
    "vision_intermediate_size": 96,
    "vision_depth": 2,
    "fullatt_block_indexes": (1,),
}
GROUPS = [
    {"tokens": 102, "kinds": ["list"]},
    {"tokens": 42, "kinds": ["box", "mcq"]},
    {"tokens": 22, "kinds": ["inverse", "point", "relation", "yes_no", "colour", "count"]},
]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration(build_config(**SMALL)).eval()


@pytest.mark.parametrize("size", [(256, 256), (320, 208), (64, 256)])
def test_batched_tower_equals_the_stock_tower(model: Any, size: tuple[int, int]) -> None:
    phase = {"objects": (1, 2)}
    images = batches.make_tower_batch("train", 0, 2, size, phase).images
    visual = model.model.visual
    with torch.no_grad():
        ours = merge(visual, tower_features(visual, images, torch.float32))
        pixels = build_processor().image_processor(
            images=[Image.fromarray(image.numpy()) for image in images], return_tensors="pt"
        )
        assert pixels["image_grid_thw"].tolist() == [[1, size[1] // 8, size[0] // 8]] * 2
        stock = visual(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
    torch.testing.assert_close(ours.flatten(0, 1), stock, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pictures", [1, 2])
def test_packed_questions_equal_single_prompts_through_processor_and_stock_forward(model: Any, pictures: int) -> None:
    """Every slot's logits against the stock model on the processor's output for that question alone."""
    phase = {"objects": (2, 4), "groups": GROUPS, "pictures": pictures}
    batch = batches.make_text_batch("train", 5, 2, (192, 128), phase)
    processor, labelled = build_processor(), batch.labels[1] != batches.IGNORED
    with torch.no_grad():
        features = tower_features(model.model.visual, batch.images.flatten(0, 1), torch.float32)
        tokens = merge(model.model.visual, features)
        embeddings = model.get_input_embeddings()(batch.ids)
        embeddings = embeddings.index_copy(1, batch.layout.visual, tokens.unflatten(0, (2, pictures)).flatten(1, 2))
        ours = model.lm_head(decode(model.model.language_model, embeddings, batch.layout)[1][labelled])
    images = [Image.fromarray(np.asarray(image)) for image in batch.images[1]]
    rows, kinds = [], set()
    for sample in filter(None, batch.samples[1]):
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": tasks.prompt_of(sample)}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=[text + sample.answer], images=images, return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**inputs).logits[0, -len(batches.encode(sample.answer)) - 1 :])
        kinds.add(sample.task)
    assert {"list", "grounding", "mcq", "inverse", "yes_no"} <= kinds
    torch.testing.assert_close(ours, torch.cat(rows), atol=5e-5, rtol=1e-4)


def test_tokens_of_a_window_stand_where_they_would_in_the_whole_picture() -> None:
    groups, origin, cell = ((1, 8),), (32, 64), 16
    whole = batches.layout_for((256, 256), 1, groups)
    part = batches.layout_for((128, 96), 1, groups, origin, (256, 256))
    rows, columns = np.mgrid[0:6, 0:8]
    same = torch.from_numpy(((rows + origin[1] // cell) * 16 + columns + origin[0] // cell).ravel())
    assert torch.equal(part.positions[:, part.visual], whole.positions[:, whole.visual[same]])
    assert torch.equal(part.positions[:, part.prefix :], whole.positions[:, whole.prefix :])


def test_questions_about_a_window_count_from_the_corner_of_the_whole_picture() -> None:
    phase = {"objects": [1, 2], "frame": [256, 256], "groups": [{"tokens": 40, "kinds": ["list", "box", "inverse"]}]}
    places = set()
    for first in range(0, 40, 2):
        batch = batches.make_text_batch("train", first, 1, (96, 96), phase)
        x, y = batches.window_origin("train", first, (96, 96), (256, 256))
        places.add((x, y))
        for sample in batch.samples[0]:
            if sample is not None and sample.box is not None:
                x1, y1, x2, y2 = sample.box
                assert x <= x1 < x2 <= x + 96
                assert y <= y1 < y2 <= y + 96
                assert sample.answer == tasks.format_box(sample.box)
    assert len(places) > 10
    assert max(x for x, _ in places) == max(y for _, y in places) == 160


@pytest.mark.parametrize("category", sorted(clips.TASKS))
def test_questions_about_a_clip_equal_single_prompts_on_real_video_tokens(model: Any, category: str) -> None:
    """Places in time and every slot's logits against the stock model on a video."""
    groups = [{"tokens": 200, "kinds": ["list"]}, {"tokens": 190, "kinds": ["choice", "say"]}]
    batch = training_clips.make_clip_batch("train", 7, 2, {"clips": [category], "groups": groups})
    processor, labelled = build_processor(), batch.labels[1] != batches.IGNORED
    with torch.no_grad():
        features = tower_features(model.model.visual, batch.images.flatten(0, 1), torch.float32)
        tokens = merge(model.model.visual, features).unflatten(0, batch.images.shape[:2]).flatten(1, 2)
        embeddings = model.get_input_embeddings()(batch.ids).index_copy(1, batch.layout.visual, tokens)
        ours = model.lm_head(decode(model.model.language_model, embeddings, batch.layout)[1][labelled])
    frames = batch.images[1].permute(0, 3, 1, 2).repeat_interleave(clips.FRAMES_A_STEP, dim=0)
    assert frames.unique(dim=0).shape[0] > 1
    rows = []
    for sample in filter(None, batch.samples[1]):
        content = [{"type": "video"}, {"type": "text", "text": tasks.prompt_of(sample)}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(
            text=[text + sample.answer],
            videos=[frames],
            video_metadata=[{"fps": clips.FRAMES_A_STEP / clips.SECONDS_A_STEP, "total_num_frames": len(frames)}],
            do_sample_frames=False,
            return_tensors="pt",
        )
        assert inputs["video_grid_thw"].tolist() == [[8, 14, 14]]
        with torch.no_grad():
            rows.append(model(**inputs).logits[0, -len(batches.encode(sample.answer)) - 1 :])
    torch.testing.assert_close(ours, torch.cat(rows), atol=5e-5, rtol=1e-4)
