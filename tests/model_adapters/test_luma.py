"""The brightness that methods see is that of the frames before the processor, token by token."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import ivcp_eval
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.registry import adapter
from tests.engine import tiny_models
from tests.engine.contract.cases import Case
from tests.model_adapters.families._qwen import VIDEOS
from tests.model_adapters.test_decoded_videos import processor_of


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def grey(frames: Any) -> Any:
    return frames @ np.array([0.299, 0.587, 0.114]) / 255


def heard(case: Case, inputs: dict[str, Any], way: str) -> torch.Tensor:
    with case.prune() as recording:
        case.forward(inputs) if way == "forward" else case.generate(inputs, 1)
    return recording.calls[0][0].vision["luma"]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_a_step_shows_two_frames(family: str, way: str) -> None:
    steps, rows, columns = VIDEOS[0]
    patch = 16 if family == "qwen3_vl" else 14
    frames = noise(2 * steps, 2 * patch * rows, 2 * patch * columns)
    part = {"video": frames, "seconds": [float(t) for t in range(2 * steps)]}
    processor = copy.deepcopy(processor_of(family))
    if family != "qwen3_vl":  # the laboratory's normalises otherwise
        processor.video_processor.image_mean, processor.video_processor.image_std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    made = adapter(family).encode(processor, [[part, {"text": "what?"}]])
    case = Case(family, "eventprune")
    inputs = case.inputs("t3 i2 t2 v0 t5")
    assert made["video_grid_thw"].tolist() == inputs["video_grid_thw"].tolist()
    inputs["pixel_values_videos"] = made["pixel_values_videos"]
    luma = heard(case, inputs, way)[-steps * rows * columns :].view(steps, rows, columns, 2, -1)
    # Pixels of a token lie patch by patch.
    wanted = grey(frames).reshape(steps, 2, rows, 2, patch, columns, 2, patch).transpose(0, 2, 5, 1, 3, 6, 4, 7)
    assert np.allclose(luma.numpy(), wanted.reshape(luma.shape), atol=1e-5)


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_tiles(way: str) -> None:
    case, tiles = Case("internvl", "eventprune"), noise(3, 112, 112)
    inputs = case.inputs("t3 i0 t5")
    pixels = (tiles / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    inputs["pixel_values"] = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    wanted = grey(tiles).reshape(3, 4, 28, 4, 28).transpose(0, 1, 3, 2, 4).reshape(48, 1, -1)
    assert np.allclose(heard(case, inputs, way).numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("family", ["llava_onevision", "deepseek_vl2"])
def test_tokens_that_are_no_rectangles_of_pixels(family: str) -> None:
    model, _ = tiny_models.build(family)
    words = f"'eventprune' needs the pixels of every visual token, but on '{family}' a token is no rectangle of them"
    with pytest.raises(Unsupported, match=words), ivcp_eval.prune(model, "eventprune", 0.5):
        pass
