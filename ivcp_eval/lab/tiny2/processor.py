"""Tokenizer, processor and configuration of the second embedded model, all of them stock transformers classes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer

from ivcp_eval.lab.tiny.processor import build_fast_tokenizer, stock_processor
from ivcp_eval.lab.tiny.vocabulary import SPECIAL_TOKENS
from ivcp_eval.lab.tiny.vocabulary import build_tokenizer as build_base_tokenizer
from ivcp_eval.lab.tiny2.scenes import CELL

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor

MERGE_SIZE = 2
PATCH_SIZE = CELL // MERGE_SIZE
#: Side in visual tokens of the tower's attention windows.
WINDOW_CELLS = 8
#: Steps in time positions of a second of a clip.
TOKENS_PER_SECOND = 4
#: Pixel limits of the image processor; pictures lie inside with sides divisible by 16 and are never resized.
MIN_PIXELS = 4 * CELL * CELL
MAX_PIXELS = 1024 * CELL * CELL
#: Words and phrases beyond those of the first embedded model, one token each.
PHRASES = (
    "List all objects with their boxes.",
    "What is at [",
    "]?",
    "Point to the",
    "Picture 1: ",
    "Picture 2: ",
    "Picture 3: ",
    "In picture ",
    "What texture has the",
    "Where is the",
    "Which object moves first?",
    "In which direction does the",
    " move?",
    " moves",
    " first",
    " last",
    " top",
    " bottom",
    " middle",
    " up",
    " down",
    "dotted",
    "checked",
    "horizontal",
    "vertical",
    "diagonal",
    " touching",
    " behind",
    " in front of",
    " between",
    " more",
    " fewer",
    " than",
    " video",
)
#: Coordinates in answers and questions are multiples of this many pixels, one token each (as location tokens are).
STEP = 8
COORDINATES = tuple(str(value) for value in range(0, 449, STEP))


@lru_cache(maxsize=1)
def build_tokenizer() -> Tokenizer:
    """The first embedded model's tokenizer with phrases and coordinates added (shared object: do not change it)."""
    tokenizer = build_base_tokenizer()
    added = (*PHRASES, ", ", *COORDINATES)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return tokenizer


def coordinate_ids() -> list[int]:
    """Token ids of `COORDINATES`, ascending in value."""
    vocabulary = build_tokenizer().get_vocab()
    return [vocabulary[text] for text in COORDINATES]


def build_processor() -> Qwen2_5_VLProcessor:
    """Return a stock ``Qwen2_5_VLProcessor`` (left padding, as batched generation needs)."""
    return stock_processor(build_fast_tokenizer(build_tokenizer()), PATCH_SIZE, MIN_PIXELS, MAX_PIXELS)


def save_processor(path: str | Path) -> None:
    """Write tokenizer, image and video processor and chat template to the folder ``path`` (created if missing)."""
    build_processor().save_pretrained(path)


def build_config(
    *,
    hidden_size: int = 256,
    num_layers: int = 12,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate_size: int = 640,
    mrope_section: tuple[int, int, int] = (1, 3, 28),
    rope_theta: float = 1e3,
    vision_hidden_size: int = 128,
    vision_depth: int = 5,
    vision_heads: int = 2,
    vision_intermediate_size: int = 384,
    fullatt_block_indexes: tuple[int, ...] = (2, 4),
) -> Qwen2_5_VLConfig:
    """Return a stock Qwen2.5-VL configuration with this tokenizer's ids.

    ``mrope_section`` counts rotary frequencies for (time, height, width), fastest first. Thirds, as published,
    would leave the width none that turns by more than 0.011 rad a token; with (1, 3, 28) rows get 0.81 to 0.52 rad,
    the columns 0.42 and less, down to frequencies too slow to tell places, which carry what a token is.

    Raises:
        ValueError: if the head size does not fit ``mrope_section`` or heads do not divide.
    """
    from transformers import Qwen2_5_VLConfig

    if hidden_size % num_heads or num_heads % num_key_value_heads:
        raise ValueError(
            f"hidden_size {hidden_size}, num_heads {num_heads}, num_key_value_heads {num_key_value_heads}: "
            "num_heads must divide hidden_size, and num_key_value_heads must divide num_heads"
        )
    half = hidden_size // num_heads // 2
    if sum(mrope_section) != half:
        raise ValueError(f"mrope_section {tuple(mrope_section)} must sum to half the head size, {half}")
    tokenizer = build_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": tokenizer.get_vocab_size(),
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_key_value_heads,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": rope_theta,
                "mrope_section": list(mrope_section),
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden_size,
            "intermediate_size": vision_intermediate_size,
            "num_heads": vision_heads,
            "in_channels": 3,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": 2,
            "window_size": WINDOW_CELLS * CELL,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": list(fullatt_block_indexes),
            "tokens_per_second": TOKENS_PER_SECOND,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config
