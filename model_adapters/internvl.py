"""InternVL2.5 and InternVL3: InternViT tiles and a thumbnail, pixel shuffle, InternLM2 or Qwen2.5.

Papers: https://arxiv.org/abs/2412.05271, https://arxiv.org/abs/2504.10479
Classes: transformers' InternVLForConditionalGeneration; InternLM2 runs as Llama, of which it is a renaming with fused
query, key and value weights. The original checkpoints and the ``-hf`` conversions both load, without remote code.
Prompts: VLMEvalKit's InternVLChat (V2.0) with the conversation template "internvl2_5", and
https://github.com/FireRedTeam/IVC-Prune @ 03afd9c for grounding.
Boxes: as InternVL's evaluation reads them (https://github.com/OpenGVLab/InternVL @ 0355722,
internvl_chat/eval/refcoco/evaluate_grounding.py): thousandths of the image, but coordinates that add up to less than 4
are fractions of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ivcp_eval.interface import GREEDY, WHOLE, Checkpoint, ImageSpan, QuestionKind, View, VisionTap
from model_adapters import _internvl_checkpoint as original
from model_adapters import _internvl_processor
from model_adapters._prompts import letter_question
from model_adapters._shrink import shrunk_to_tiles
from model_adapters._transformers import AbstractTransformersAdapter, image_runs, placement
from model_adapters._vision import IMAGENET, vit_tap

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TILE = 256  # tokens of a tile in every published model
MAX_TILES = 6  # of one image in the published evaluation; text-heavy benchmarks used 12 to 24 there
SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
SINGLE_WORD = "Answer the question using a single word or phrase."


def _originals(prefix: str, hub: str, sizes: str, plain: str) -> tuple[Checkpoint, ...]:
    return tuple(
        Checkpoint(prefix if size == plain else f"{prefix}_{size.lower()}", f"OpenGVLab/{hub}-{size}")
        for size in sizes.split()
    )


class Adapter(AbstractTransformersAdapter):
    """Wiring of InternVL, and of its language models used alone (then `prune` needs ``image_mask=``)."""

    model_types = ("internvl", "llama", "qwen2")
    closing_tokens = 1  # </img>
    no_videos = "its processor makes pictures of a video's frames"
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        *_originals("internvl25", "InternVL2_5", "1B 2B 4B 8B 26B 38B 78B", plain="8B"),
        *_originals("internvl3", "InternVL3", "1B 2B 8B 14B 38B 78B", plain="8B"),
    )
    box_format = "internvl"
    generation: ClassVar[Mapping[str, Any]] = {**GREEDY, "max_new_tokens": 4096}

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """One image per run of <IMG_CONTEXT>: its tiles, row by row, and the thumbnail last.

        How the tiles lie, (w, h), is not among the model's inputs; `layout` finds it from the picture.
        """
        tile = getattr(model.config, "image_seq_length", TILE)
        return [[_span(run, tile) for run in image_runs(row)] for row in mask]

    def vision_tap(self, model: Any) -> VisionTap | None:
        """InternViT's last block; pixel shuffle joins patches to tokens, whose signals are averaged."""
        tower = getattr(model.model, "vision_tower", None)
        if tower is None:
            return None
        pool = round(1 / model.config.downsample_ratio)
        return vit_tap(tower, -1, class_token=True, pool=pool, normalised=IMAGENET)

    def config(self, source: str) -> Any:
        """Of an original checkpoint, what it is converted to."""
        folder = Path(source)
        if not original.is_original(folder):
            return super().config(source)
        return original.native_config(json.loads((folder / "config.json").read_text()), original.added_tokens(folder))

    def shrunk_size(self, processor: Any, size: tuple[int, int], share: float) -> tuple[int, int] | None:
        """A grid of fewer tiles, to which the processor would stretch a picture of any size and these proportions."""

        def count(sizes: list[tuple[int, int]]) -> list[int]:
            counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
            return [n * processor.image_seq_length for n in counted["num_image_patches"]]

        tiles = processor.image_processor
        return shrunk_to_tiles(count, size, share, (tiles.size["width"], tiles.size["height"]), tiles.max_patches)

    def load_model(self, source: str, *, dtype: torch.dtype, device: str, attention: str, **options: Any) -> Any:
        """An original checkpoint is converted as it is read; an ``-hf`` one is transformers' own."""
        folder = _folder(source, options.get("revision"))
        if not original.is_original(folder):
            return super().load_model(str(folder), dtype=dtype, device=device, attention=attention, **options)
        placed = placement(device, options)
        quantised = {name: value for name, value in options.items() if name == "quantization_config"}
        model = original.load_model(folder, dtype, attention, **placed, **quantised)
        return (model if placed else model.to(device)).eval()

    def load_processor(self, source: str, **options: Any) -> Any:
        """As `load_model`; images are cut into at most `MAX_TILES` tiles."""
        folder = _folder(source, options.get("revision"))
        if original.is_original(folder):
            processor = _internvl_processor.load(folder)
        else:
            processor = super().load_processor(str(folder), **options)
        processor.image_processor.max_patches = MAX_TILES
        frames_as_tiles(processor)
        return processor

    def prompt(self, kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
        """The published wording; yes/no questions get HallusionBench's, without asking twice for yes or no."""
        if kind == "grounding":
            request = "Please provide the bounding box coordinate of the region this sentence describes"
            return f"{request}: <ref>{question}</ref>"
        if kind == "mcq":
            return letter_question(question, options, hint)
        if kind == "yes_no":
            wording = question if "yes or no" in question.lower() else f"{question} Please answer yes or no."
            return f"{wording} {SINGLE_WORD}"
        return f"{question}\n{SINGLE_WORD}"

    def turn(self, processor: Any, parts: list[Mapping[str, Any]]) -> str:
        """Videos and images first, images numbered if several, then the text, in the originals' template."""
        return conversation(parts, processor.image_token, processor.video_token)

    def layout(self, processor: Any, conversations: list[list[Mapping[str, Any]]]) -> Mapping[str, Any]:
        """The tile grid of a single image, all that the released pruning code can use; and the frames of videos."""
        images = [part["image"] for parts in conversations for part in parts if "image" in part]
        tiles = {"tiles": tile_grid(processor.image_processor, images[0].size)} if len(images) == 1 else {}
        in_order = [sorted(parts, key=lambda part: "video" not in part) for parts in conversations]  # as `turn`
        return {**tiles, **super().layout(processor, in_order)}


def frames_as_tiles(processor: Any) -> None:
    """Make the processor turn each frame of a video into one tile, as the published evaluation does."""
    for name in ("size", "image_mean", "image_std"):
        setattr(processor.video_processor, name, getattr(processor.image_processor, name))


def _folder(source: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))


def _span(run: Tensor, tile: int) -> ImageSpan:
    n = run.numel()
    if n % tile:
        return ImageSpan(run)
    side = round(tile**0.5)
    grid = (side, side) if n == tile == side * side else None
    return ImageSpan(run, grid=grid, views=(tile,) * (n // tile), lay_out=_lay_out)


def _lay_out(span: ImageSpan) -> tuple[View, ...]:
    """The tiles as one grid and the thumbnail; each tile on its own where it is not known how they lie."""
    side, n = round(span.views[0] ** 0.5), len(span.views)
    cells = np.arange(n * side * side).reshape(n, side, side)
    if n == 1:
        return (View("picture", cells[0], WHOLE),)
    overview = View("overview", cells[-1], WHOLE)
    w, h = span.tiles or (0, 0)
    if w * h != n - 1:
        return (overview, *(View(f"tile {number + 1}", tile) for number, tile in enumerate(cells[:-1])))
    joined = cells[:-1].reshape(h, w, side, side).transpose(0, 2, 1, 3).reshape(h * side, w * side)
    return View("tiles", joined, WHOLE), overview


def conversation(parts: list[Mapping[str, Any]], image_token: str, video_token: str = "") -> str:
    """One user turn; with several images "Image-1: ...", and "<Image-1>" where one stood among the text.

    As VLMEvalKit's ``reorganize_prompt``: the marks are dropped where all images stand together. A video, of which
    the processor makes "Frame1: ...", stands before all else.
    """
    videos = f"{video_token}\n" * sum("video" in part for part in parts)
    parts = [part for part in parts if "video" not in part]
    texts = [part["text"] for part in parts if "text" in part]
    n = len(parts) - len(texts)
    if n <= 1:
        question = (f"{image_token}\n" if n else "") + "\n".join(texts)
    else:
        marks = [f"<Image-{i + 1}>" for i in range(n)]
        unread = iter(marks)
        marked = "".join(part["text"] if "text" in part else next(unread) for part in parts)
        question = "".join(f"Image-{i + 1}: {image_token}\n" for i in range(n)) + marked.replace("".join(marks), "")
    user = f"<|im_start|>user\n{videos}{question}<|im_end|>\n"
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{user}<|im_start|>assistant\n"


def tile_grid(image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(w, h) tiles that the image processor cuts an image of ``size`` (width, height) into."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    tile = image_processor.size["height"], image_processor.size["width"]
    limits = image_processor.min_patches, image_processor.max_patches
    columns, rows = get_optimal_tiled_canvas((size[1], size[0]), tile, *limits)
    return columns, rows
