"""The processor of InternVL's original checkpoints, whose own tokenizer and preprocessing are remote code.

Qwen2-based checkpoints carry Qwen2's tokenizer files. InternLM2-based ones carry a SentencePiece model that the Llama
tokenizer reads: byte-pair merges with byte fallback, no space put in front (convert_internvl_weights_to_hf.py in
https://github.com/huggingface/transformers @ 015d3b2 sets the same). Images: 448 x 448 tiles, ImageNet statistics.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_adapters._internvl_checkpoint import added_tokens

SPECIAL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",  # the processor wants one; it is no token of these vocabularies
}
_NORMAL, _BYTE, _CONTROL = 1, 6, 3  # SentencePiece.Type in sentencepiece_model.proto


def load(folder: Path) -> Any:
    """``InternVLProcessor`` of an original checkpoint folder.

    Raises:
        ValueError: neither vocab.json and merges.txt nor tokenizer.model are there.
    """
    from transformers import InternVLProcessor, InternVLVideoProcessor

    config = json.loads((folder / "config.json").read_text())
    side = config.get("force_image_size") or config["vision_config"]["image_size"]
    n_tokens = int((side // config["vision_config"]["patch_size"]) ** 2 * config["downsample_ratio"] ** 2)
    return InternVLProcessor(
        image_processor=_image_processor(side),
        tokenizer=tokenizer(folder),
        video_processor=InternVLVideoProcessor(),  # the class asks for one; no video is ever passed
        image_seq_length=n_tokens,
    )


def _image_processor(side: int) -> Any:
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor as Processor
    else:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil as Processor
    return Processor(
        size={"height": side, "width": side},
        crop_to_patches=True,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def tokenizer(folder: Path) -> Any:
    """Qwen2's or InternLM2's tokenizer, the added tokens at their published ids."""
    from transformers import LlamaTokenizer, Qwen2Tokenizer

    if (folder / "merges.txt").is_file():
        tokenizer = Qwen2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
        end, pad = "<|im_end|>", "<|endoftext|>"
    elif (folder / "tokenizer.model").is_file():
        from transformers.convert_slow_tokenizer import generate_merges

        pieces = list(read_sentencepiece((folder / "tokenizer.model").read_bytes()))
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        control = [piece for piece, kind in pieces if kind in (_CONTROL, _BYTE)]
        merges = generate_merges(vocabulary, None, skip_tokens=control)
        tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, add_prefix_space=False, add_bos_token=True)
        end, pad = "</s>", "</s>"
    else:
        raise ValueError(
            f"{folder} holds neither merges.txt (Qwen2) nor tokenizer.model (InternLM2); download it whole"
        )
    _add(tokenizer, added_tokens(folder))
    for name, token in {"eos_token": end, "pad_token": pad}.items():
        setattr(tokenizer, name, token)
    for name, token in SPECIAL.items():  # attributes that InternVLProcessor reads
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    tokenizer.padding_side = "left"
    return tokenizer


def _add(tokenizer: Any, tokens: dict[str, int]) -> None:
    """Append tokens; their ids follow from their order and must come out as published."""
    from transformers import AddedToken

    for content, number in sorted(tokens.items(), key=lambda item: item[1]):
        tokenizer.add_tokens([AddedToken(content, special=True, normalized=False)], special_tokens=True)
        got = tokenizer.convert_tokens_to_ids(content)
        if got != number:
            raise ValueError(f"added token {content!r} got id {got}, the checkpoint says {number}")


def read_sentencepiece(data: bytes) -> Iterator[tuple[str, int]]:
    """(piece, type) of every piece of a SentencePiece model, in id order.

    A ``ModelProto`` repeats field 1, a ``SentencePiece`` with the piece in field 1 and its type (default 1, NORMAL) in
    field 3; everything else is skipped. Read here because the SentencePiece library is needed for nothing else.
    """
    for field, piece in _fields(data):
        if field == 1:
            inner = dict(_fields(piece))
            yield inner[1].decode(), inner.get(3, _NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protocol-buffers message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size, at = (8, at) if kind == 1 else (4, at) if kind == 5 else _varint(data, at)
        if kind not in (1, 2, 5) or at + size > len(data):
            raise ValueError("tokenizer.model is no SentencePiece model, or was cut off; download it again")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("tokenizer.model is no SentencePiece model, or was cut off; download it again")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
