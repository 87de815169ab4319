"""Random-weight Qwen2.5-VL models of a given shape, and prompts for them. Speed does not depend on the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.interface.registry import unknown

if TYPE_CHECKING:
    from torch import Tensor

_SMALL_IDS = {"image_token_id": 4, "video_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7}


@dataclass(frozen=True)
class Size:
    """A shape, and what is measured on it by default.

    Attributes:
        text, vision: arguments of the text and vision configuration. ids: token ids of the outer one.
        visual_tokens, batches: prompts. cuts: (ratio, layer) of the pruned variants.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    ids: dict[str, int]
    visual_tokens: tuple[int, ...]
    batches: tuple[int, ...]
    cuts: tuple[tuple[float, int], ...]
    text_tokens: int = 60
    new_tokens: int = 8
    rounds: int = 5
    rope_theta: float = 1e6
    mrope_section: tuple[int, int, int] = field(default=(16, 24, 24))


def _small_text(layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int) -> dict[str, Any]:
    return {
        "vocab_size": 2048,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _small_vision(out: int) -> dict[str, Any]:
    sizes = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": out}
    return {**sizes, "window_size": 112, "fullatt_block_indexes": [1]}


SIZES: dict[str, Size] = {
    # Two layers: the same code path in seconds, for tests.
    "tiny": Size(
        text=_small_text(layers=3, hidden=64, heads=4, kv_heads=2, intermediate=128),
        vision=_small_vision(64),
        ids=_SMALL_IDS,
        visual_tokens=(64,),
        batches=(1, 2),
        cuts=((0.5, 1), (0.25, 2)),
        text_tokens=12,
        new_tokens=3,
        rounds=2,
        mrope_section=(2, 3, 3),
    ),
    "small": Size(
        text=_small_text(layers=12, hidden=512, heads=8, kv_heads=2, intermediate=2048),
        vision=_small_vision(512),
        ids=_SMALL_IDS,
        visual_tokens=(1024,),
        batches=(1,),
        cuts=((0.5, 6), (0.25, 6), (0.5, 2), (0.25, 2)),
        rounds=9,
        mrope_section=(8, 12, 12),
    ),
    # config.json of Qwen/Qwen2.5-VL-7B-Instruct.
    "qwen25_7b": Size(
        text={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
        },
        vision={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        ids={
            "image_token_id": 151655,
            "video_token_id": 151656,
            "vision_start_token_id": 151652,
            "vision_end_token_id": 151653,
        },
        visual_tokens=(1024, 4096, 16384),
        batches=(1, 8),
        cuts=((0.5, 16), (0.25, 16), (0.5, 2)),
        new_tokens=8,
        rounds=3,
    ),
}


def size(name: str) -> Size:
    """The `Size` of a name; ValueError with the nearest match if there is none."""
    if name not in SIZES:
        raise unknown("model size", name, SIZES)
    return SIZES[name]


def configuration(shape: Size, **depths: int) -> Any:
    """A stock Qwen2_5_VLConfig. ``layers`` and ``vision_depth`` shorten the part that is not measured."""
    from transformers import Qwen2_5_VLConfig

    rope = {"rope_type": "default", "rope_theta": shape.rope_theta, "mrope_section": list(shape.mrope_section)}
    text = {**shape.text, "num_hidden_layers": depths.get("layers", shape.text["num_hidden_layers"])}
    vision = {**shape.vision, "depth": depths.get("vision_depth", shape.vision["depth"])}
    return Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config=vision,
        tie_word_embeddings=False,
        **shape.ids,
    )


def build_model(config: Any, device: str, dtype: torch.dtype, attention: str, weights: str = "") -> Any:
    """Qwen2_5_VLForConditionalGeneration with random weights, created on ``device`` (no copy on the host).

    Args:
        weights: how they are stored, of `interface.models.QUANTISED`; empty: as ``dtype``.
    """
    from transformers import AutoModelForImageTextToText

    from ivcp_eval.runs.answering.quantising import loading, quantise

    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    if further := loading(weights, dtype):
        further |= {"config": config, "dtype": dtype, "attn_implementation": attention, "device_map": {"": device}}
        model = type(model).from_pretrained(None, state_dict=model.state_dict(), **further)
    quantise(model, weights)
    model.generation_config.eos_token_id = None  # every variant decodes the same number of steps
    model.generation_config.pad_token_id = 0
    return model.eval()


def grid_of(tokens: int) -> tuple[int, int]:
    """(rows, columns) of the squarest grid of exactly ``tokens`` visual tokens."""
    rows = next(r for r in range(math.isqrt(tokens), 0, -1) if tokens % r == 0)
    return rows, tokens // rows


def make_inputs(
    config: Any, visual_tokens: int, batch: int, text_tokens: int, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Arguments of ``generate``: per row one image with a third of the text before it and the rest behind.

    Rows differ in text and pixels, not in length.
    """
    generator = torch.Generator().manual_seed(0)
    vision = config.vision_config
    merge = vision.spatial_merge_size
    rows, columns = grid_of(visual_tokens)
    special = (value for name, value in vars(config).items() if name.endswith("_token_id") and value)
    highest = min(1000, config.get_text_config().vocab_size, *(token for token in special if token > 8))
    text = torch.randint(8, highest, (batch, text_tokens), generator=generator)
    before, after = text.tensor_split([text_tokens // 3], dim=1)
    before[:, -1], after[:, 0] = config.vision_start_token_id, config.vision_end_token_id
    ids = torch.cat((before, torch.full((batch, visual_tokens), config.image_token_id), after), dim=1)
    # One image's pixels for every row: drawing half a million patches on the host would take longer than the run.
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(visual_tokens * merge**2, patch, generator=generator)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
        "image_grid_thw": torch.tensor([[1, rows * merge, columns * merge]]).expand(batch, -1).contiguous(),
    }
    return {
        **{name: tensor.to(device) for name, tensor in inputs.items()},
        "pixel_values": pixels.to(device, dtype).repeat(batch, 1),
    }
