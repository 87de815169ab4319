"""The processor of InternVL's original checkpoints: both tokenizers from published file layouts, prompts, tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ivcp_eval
from ivcp_eval.interface.models import locate
from ivcp_eval.interface.registry import adapter
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement
from model_adapters._internvl_processor import read_sentencepiece
from model_adapters.internvl import SYSTEM, conversation
from tests.model_adapters import published_layout
from tests.model_adapters.test_internvl_checkpoint import config, internlm2_shapes, qwen2_shapes, shapes

ADDED = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "</ref>"]


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def sentencepiece_model(pieces: list[tuple[str, float, int]]) -> bytes:
    """A ModelProto: pieces (field 1) with text, score (float32, field 2) and type; a trainer spec (field 2) behind."""
    import struct

    out = b""
    for text, score, kind in pieces:
        inner = b"\x0a" + varint(len(text.encode())) + text.encode() + b"\x15" + struct.pack("<f", score)
        inner += b"\x18" + varint(kind) if kind != 1 else b""
        out += b"\x0a" + varint(len(inner)) + inner
    return out + b"\x12\x02\x18\x01"


def internlm2_files(folder: Path) -> int:
    """tokenizer.model with bytes, letters and two merges; returns the vocabulary's size."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    pieces += [("ca", -1.0, 1), ("cat", -2.0, 1), ("▁", -3.0, 1), ("c", -4.0, 1), ("a", -5.0, 1), ("t", -6.0, 1)]
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    return len(pieces)


def qwen2_files(folder: Path) -> int:
    """vocab.json and merges.txt of a byte-level tokenizer."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "ca", "cat", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t\n")
    return len(tokens)


@pytest.fixture(params=["internlm2", "qwen2"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Any, Any, dict[str, int]]:
    """(language, model, processor, ids of the added tokens) of an original checkpoint."""
    language = str(request.param)
    names = internlm2_shapes() if language == "internlm2" else qwen2_shapes()
    folder = published_layout.write(
        tmp_path, config(language, False), published_layout.draw(shapes(names, large_tower=False))
    )
    size = internlm2_files(folder) if language == "internlm2" else qwen2_files(folder)
    ids = {token: size + i for i, token in enumerate(ADDED)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    model, processor = adapter("internvl").load(
        str(folder), revision=None, dtype=torch.float32, device="cpu", attention="sdpa"
    )
    return language, model, processor, ids


def test_tokens_are_as_published(loaded: tuple[str, Any, Any, dict[str, int]]) -> None:
    language, model, processor, ids = loaded
    assert {token: processor.tokenizer.convert_tokens_to_ids(token) for token in ADDED} == ids
    assert model.config.image_token_id == processor.image_token_id == ids["<IMG_CONTEXT>"]
    text = "cat tac é<|im_end|>\n"
    encoded = processor.tokenizer(text)["input_ids"]
    words = processor.tokenizer.convert_ids_to_tokens(encoded)
    if language == "internlm2":
        assert words == ["<s>", "cat", "▁", "t", "a", "c", "▁", "<0xC3>", "<0xA9>", "<|im_end|>", "<0x0A>"]
    else:
        assert words[:5] == ["cat", "Ġ", "t", "a", "c"]
    assert processor.tokenizer.decode(encoded, skip_special_tokens=True) == "cat tac é\n"


def test_prompt_and_tiles_reach_the_model(loaded: tuple[str, Any, Any, dict[str, int]]) -> None:
    _, model, processor, ids = loaded
    wired = adapter("internvl")
    picture = Image.new("RGB", (60, 30), (200, 30, 30))
    turn = [{"image": picture}, {"text": "cat"}]
    inputs = wired.encode(processor, [turn])
    layout = wired.layout(processor, [turn])
    assert layout == {"tiles": (2, 1)}
    assert inputs["pixel_values"].shape == (3, 3, 56, 56)  # two tiles and the thumbnail
    row = inputs["input_ids"][0].tolist()
    first = row.index(ids["<IMG_CONTEXT>"])
    assert row[first - 1 : first + 13] == [ids["<img>"], *[ids["<IMG_CONTEXT>"]] * 12, ids["</img>"]]
    for preset in ("general", "official"):
        with torch.no_grad(), ivcp_eval.prune(model, "ivc_prune", 0.5, layer=1, preset=preset, **layout) as run:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert run.visual_prompt == [12]
        assert run.visual_kept == [6]


def test_several_samples_are_padded_on_the_left(loaded: tuple[str, Any, Any, dict[str, int]]) -> None:
    _, _, processor, ids = loaded
    picture = Image.new("RGB", (56, 56))
    turns = [[{"text": "a"}], [{"image": picture}, {"text": "cat"}, {"image": picture}]]
    inputs = adapter("internvl").encode(processor, turns)
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][1].all()
    assert (inputs["input_ids"] == ids["<IMG_CONTEXT>"]).sum(1).tolist() == [0, 8]


def test_conversation_as_the_published_evaluation() -> None:
    head, tail = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    image, a, b = {"image": None}, {"text": "a"}, {"text": "b"}
    assert conversation([a], "#") == f"{head}a{tail}"
    assert conversation([a, image], "#") == f"{head}#\na{tail}"
    assert conversation([image, image, a], "#") == f"{head}Image-1: #\nImage-2: #\na{tail}"
    assert conversation([image, a, image, b], "#") == f"{head}Image-1: #\nImage-2: #\n<Image-1>a<Image-2>b{tail}"


def test_a_broken_tokenizer_file_is_named() -> None:
    whole = sentencepiece_model([("<unk>", 0.0, 2), ("a", -1.5, 1)])
    assert list(read_sentencepiece(whole)) == [("<unk>", 2), ("a", 1)]
    with pytest.raises(ValueError, match="cut off"):
        list(read_sentencepiece(whole[:-6]))
    with pytest.raises(ValueError, match="SentencePiece"):
        list(read_sentencepiece(b"\x0b<html>"))


@pytest.mark.parametrize("preset", ["general", "official"])
def test_a_session_answers_with_the_official_preset(preset: str, tmp_path: Path) -> None:
    """The tile grid reaches `prune` from the picture, which the model's inputs do not show."""
    folder = published_layout.write(
        tmp_path, config("qwen2", False), published_layout.draw(shapes(qwen2_shapes(), large_tower=False))
    )
    size = qwen2_files(folder)
    (folder / "added_tokens.json").write_text(json.dumps({token: size + i for i, token in enumerate(ADDED)}))
    session = Session(
        locate("internvl25_1b", path=folder), Placement(device="cpu").resolve(), Limits(None, None, max_new_tokens=3)
    )
    variant = Variant("internvl25_1b", "ivc_prune", 0.5, {"preset": preset, "layer": 1})
    answer = session.answer([{"image": Image.new("RGB", (60, 30))}, {"text": "cat"}], variant)
    assert (answer.visual_tokens, answer.visual_kept, answer.new_tokens) == (12, 6, 3)
