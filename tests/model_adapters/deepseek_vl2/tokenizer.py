"""A byte-level tokenizer in DeepSeek-VL2's published layout, trained on a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"  # noqa: RUF001 (as published)
_LINES = [
    "Locate the giraffe at the back in the given image.",
    "Describe this image in detail. What is the colour of the car? Answer with the option's letter.",
    "The quick brown fox jumps over the lazy dog, 0123456789 times; yes or no?\n\n",
] * 3


def write(folder: Path, candidate_resolutions: list[list[int]], with_image_token: bool = True) -> Tokenizer:
    """tokenizer.json, tokenizer_config.json and processor_config.json; returns the plain tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # bos 0, eos 1 and padding 2, as published for the vocabulary of 129280.
    trainer = trainers.BpeTrainer(
        vocab_size=440,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    while tokenizer.get_vocab_size() < 500:
        tokenizer.add_tokens([f"<filler {tokenizer.get_vocab_size()}>"])
    added = ["<image>"] if with_image_token else []
    added += ["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _dump(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 4096,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizerFast",
            "unk_token": None,
            "use_default_system_prompt": False,
        },
    )
    _dump(
        folder / "processor_config.json",
        {
            "add_special_token": False,
            "candidate_resolutions": candidate_resolutions,
            "downsample_ratio": 2,
            "ignore_id": -100,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_token": "<image>",
            "mask_prompt": False,
            "normalize": True,
            "pad_token": PAD,
            "patch_size": 14,
            "processor_class": "DeepseekVLV2Processor",
            "sft_format": "deepseek",
        },
    )
    return tokenizer


def _dump(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
