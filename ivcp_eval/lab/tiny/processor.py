"""Tokenizer, processor and configuration of the tiny Qwen2.5-VL, built offline from nothing but code.

Everything is a stock transformers class, so the saved folder loads with ``AutoProcessor.from_pretrained`` and
``Qwen2_5_VLForConditionalGeneration.from_pretrained`` like any published checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.lab.tiny.vocabulary import SPECIAL_TOKENS, build_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLProcessor

PATCH_SIZE = 14
MERGE_SIZE = 2
#: Side in pixels of the image area behind one visual token.
CELL = PATCH_SIZE * MERGE_SIZE
#: Pixel limits of the image processor. Scenes lie inside, with sides divisible by 28: they are never resized.
MIN_PIXELS = 4 * CELL * CELL
MAX_PIXELS = 400 * CELL * CELL
IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.5, 0.5, 0.5)
SYSTEM_PROMPT = "You are a helpful assistant."

#: Same text as Qwen2.5-VL's published template for system, user and assistant turns with images and videos.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM_PROMPT + "<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_fast_tokenizer(tokenizer: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer (or another) as a stock fast tokenizer (left padding, as batched generation needs)."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer() if tokenizer is None else tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> Qwen2_5_VLProcessor:
    """Return a stock ``Qwen2_5_VLProcessor`` around the tiny tokenizer."""
    return stock_processor(build_fast_tokenizer(), PATCH_SIZE, MIN_PIXELS, MAX_PIXELS)


def stock_processor(
    tokenizer: PreTrainedTokenizerFast, patch_size: int, min_pixels: int, max_pixels: int
) -> Qwen2_5_VLProcessor:
    """Return a stock ``Qwen2_5_VLProcessor`` of an embedded model around its tokenizer."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    shared: dict[str, Any] = {
        "patch_size": patch_size,
        "merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shared),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**shared),
        chat_template=CHAT_TEMPLATE,
    )


def save_processor(path: str | Path) -> None:
    """Write tokenizer, image/video processor and chat template to the folder ``path`` (created if missing)."""
    build_processor().save_pretrained(path)


def build_config(
    *,
    hidden_size: int = 192,
    num_layers: int = 8,
    num_heads: int = 3,
    num_key_value_heads: int = 1,
    intermediate_size: int = 512,
    mrope_section: tuple[int, int, int] = (2, 10, 20),
    rope_theta: float = 300.0,
    vision_hidden_size: int = 128,
    vision_depth: int = 4,
    vision_heads: int = 2,
    vision_intermediate_size: int = 256,
    fullatt_block_indexes: tuple[int, ...] = (1, 3),
) -> Qwen2_5_VLConfig:
    """Return a stock Qwen2.5-VL configuration at toy sizes with the tiny tokenizer's token ids.

    ``mrope_section`` counts rotary frequencies for (time, height, width) and sums to half the head size. The
    defaults hold both frequencies that turn within a grid of 11-15 cells and slow ones for content retrieval;
    the published theta of 1e6 hardly moves over so small a grid.

    Raises:
        ValueError: if the head size does not fit ``mrope_section`` or heads do not divide.
    """
    from transformers import Qwen2_5_VLConfig

    if hidden_size % num_heads or num_heads % num_key_value_heads:
        raise ValueError(
            f"hidden_size {hidden_size}, num_heads {num_heads}, num_key_value_heads {num_key_value_heads}: "
            "num_heads must divide hidden_size, and num_key_value_heads must divide num_heads"
        )
    head_dim = hidden_size // num_heads
    if sum(mrope_section) * 2 != head_dim:
        raise ValueError(f"mrope_section {mrope_section} must sum to half the head size, {head_dim // 2}")
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
            "window_size": 4 * CELL,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": list(fullatt_block_indexes),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def build_random(path: str | Path, seed: int = 0, **sizes: Any) -> Path:
    """Save a random-weights tiny Qwen2.5-VL (float32) with its processor to ``path`` and return the folder.

    For tests that need an architecture, not an ability. ``sizes`` are the arguments of :func:`build_config`.
    The global random state is left as it was.
    """
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = Path(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(build_config(**sizes))
    finish_generation_config(model)
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


def finish_generation_config(model: Any) -> None:
    """Set greedy decoding with the right end and padding tokens on ``model.generation_config``."""
    text = model.config.text_config
    model.generation_config.do_sample = False
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
