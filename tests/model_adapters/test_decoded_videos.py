"""Decoded videos through transformers' own processors: the prompt, the grid and above all the times."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

from ivcp_eval.interface import Frame
from ivcp_eval.interface.registry import adapter
from ivcp_eval.lab.tiny.processor import CHAT_TEMPLATE, build_processor
from model_adapters.internvl import frames_as_tiles
from tests.engine import tiny_models
from tests.methods.test_downsample import tiled_processor

SECONDS = [0.0, 0.5, 1.0, 1.5, 2.0]


def clip(n: int, seconds: list[float] | None = None, size: tuple[int, int] = (112, 84)) -> dict[str, Any]:
    """Frames that grow brighter."""
    frames = [Image.new("RGB", size, (40 * index,) * 3) for index in range(n)]
    return {"video": frames, "seconds": SECONDS[:n] if seconds is None else seconds}


def qwen3_processor() -> Any:
    made = build_processor()
    shared = {"patch_size": 16, "size": {"shortest_edge": 32 * 32, "longest_edge": 512 * 32 * 32}}
    return Qwen3VLProcessor(made.image_processor, made.tokenizer, Qwen3VLVideoProcessor(**shared), CHAT_TEMPLATE)


def processor_of(family: str) -> Any:
    if family == "qwen3_vl":
        return qwen3_processor()
    if family.startswith("qwen"):
        return build_processor()
    processor = copy.deepcopy(tiled_processor(family, Path()))  # which is shared
    if family == "internvl":
        frames_as_tiles(processor)
    processor.chat_template = (
        "{% for part in messages[0]['content'] %}"
        "{{ part.text if part.type == 'text' else '<' + part.type + '>' }}{% endfor %}"
    )
    return processor


@pytest.mark.parametrize(("seconds", "pace"), [(SECONDS, 1.0), ([0, 1 / 24, 2 / 24, 3 / 24], 2 / 24), ([7.0], 2.0)])
def test_qwens_steps_last_as_long_as_the_frames_say(seconds: list[float], pace: float) -> None:
    """Not 0.0833 seconds whatever the rate, which comes out where the processor is told none."""
    parts = [clip(len(seconds), seconds), {"text": "which colour?"}]
    processor = build_processor()
    inputs = adapter("qwen2_5_vl").encode(processor, [parts])
    steps = -(-len(seconds) // 2)
    assert inputs["video_grid_thw"].tolist() == [[steps, 6, 8]]
    assert [float(at) for at in inputs["second_per_grid_ts"]] == pytest.approx([pace])
    layout = adapter("qwen2_5_vl").layout(processor, [parts])
    assert layout == {"frames": [[Frame(0, index, seconds[2 * index]) for index in range(steps)]]}


@pytest.mark.parametrize("array", [False, True])
def test_qwen3_writes_the_times_into_the_prompt(array: bool) -> None:
    """Of uneven times too; the mean of the two frames of a step."""
    processor, part = qwen3_processor(), clip(4, [0.0, 1.0, 4.0, 6.0])
    if array:
        part["video"] = np.stack([np.asarray(frame) for frame in part["video"]])
    inputs = adapter("qwen3_vl").encode(processor, [[part, {"text": "which colour?"}]])
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    first, second = (processor.tokenizer.decode(processor.tokenizer(f"<{at} seconds>").input_ids) for at in (0.5, 5.0))
    assert 0 < text.index(first) < text.index(second)
    assert inputs["video_grid_thw"].tolist()[0][0] == 2


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_a_conversation_with_a_video_and_a_picture(family: str) -> None:
    """Spans found among the inputs are those that the conversation has, with its times."""
    processor, wired = processor_of(family), adapter(family)
    picture = {"image": Image.new("RGB", (84, 56))}
    parts = [picture, {"text": "before "}, clip(4), {"text": "after"}]
    inputs = wired.encode(processor, [parts])
    (frames,) = wired.layout(processor, [parts])["frames"]
    per_step = 2 if family.startswith("qwen") else 1
    shown = [Frame(0, index, at) for index, at in enumerate(SECONDS[:4:per_step])]
    assert frames == ([*shown, None] if family == "internvl" else [None, *shown])
    names = ("input_ids", "pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes")
    given = {name: inputs[name] for name in names if name in inputs}
    config: Any = tiny_models.build(family)[0].config
    changes = {"image_token_id": processor.image_token_id, "video_token_id": getattr(processor, "video_token_id", -1)}
    if family == "internvl":
        changes["image_seq_length"] = processor.image_seq_length
    if family == "llava_onevision":
        changes |= {
            "vision_config": SimpleNamespace(image_size=384, patch_size=14),
            "vision_aspect_ratio": "anyres_max_9",
            "image_grid_pinpoints": processor.image_processor.image_grid_pinpoints,
        }
    model: Any = _Like(config, changes)
    mask = wired.image_mask(model, given)
    assert mask is not None
    (spans,) = wired.image_spans(model, mask, given)
    assert len(spans) == len(frames)
    if family != "internvl":  # whose frames are pictures to the model
        assert [span.frame and span.frame.index for span in spans] == [frame and frame.index for frame in frames]


class _Like:
    """A model of which only the configuration is asked, with some of it changed."""

    image_newline = None

    def __init__(self, config: Any, changes: dict[str, Any]) -> None:
        fields = {**config.to_dict(), "vision_config": config.vision_config, **changes}
        self.config, self.model = SimpleNamespace(**fields), self


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (clip(0), "a video without frames"),
        ({"video": clip(2)["video"]}, "got 0 times for a video of 2 frames; say when"),
        (clip(3, [0.0, 1.0]), "got 2 times for a video of 3 frames"),
        (clip(3, [0.0, 1.0, 1.0]), "must increase"),
        (clip(2, [-1.0, 1.0]), "must increase from 0"),
        (clip(2, [0.0, float("nan")]), "must increase"),
        ({**clip(2), "video": [clip(1)["video"][0], Image.new("RGB", (28, 28))]}, r"have the sizes \[\(28, 28\), "),
        ({**clip(2), "video": np.zeros((2, 28, 28))}, r"got frames \(2, 28, 28\) of float64"),
    ],
)
def test_what_is_no_video_is_refused(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter("qwen2_5_vl").encode(build_processor(), [[part, {"text": "a"}]])


def test_a_family_without_videos_says_so(tmp_path: Path) -> None:
    for family in ("llava_next", "deepseek_vl2"):
        with pytest.raises(ValueError, match="got a video, but its model takes pictures only"):
            adapter(family).encode(tiled_processor(family, tmp_path), [[clip(2), {"text": "a"}]])
