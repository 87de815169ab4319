"""LLaVA-OneVision: SigLIP tiles like LLaVA-NeXT's (single images), one overview each for several images, Qwen2.

Of a video each frame is pooled to half the rows and columns, and one newline token ends the last frame.

Paper: https://arxiv.org/abs/2408.03326
Classes: transformers' LlavaOnevisionForConditionalGeneration with the ``llava-hf`` checkpoints.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ivcp_eval.interface import WHOLE, Checkpoint, Frame, ImageSpan, View, VisionTap
from model_adapters._transformers import encoded
from model_adapters._videos import in_prompt_order, videos_by_length
from model_adapters.llava_next import Adapter as LlavaNextAdapter
from model_adapters.llava_next import _side, tiled_grid

if TYPE_CHECKING:
    from torch import Tensor


class Adapter(LlavaNextAdapter):
    """Wiring of LLaVA-OneVision."""

    model_types = ("llava_onevision",)
    no_videos = ""
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint("llava_ov", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        Checkpoint("llava_ov_05b", "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"),
        Checkpoint("llava_ov_72b", "llava-hf/llava-onevision-qwen2-72b-ov-hf"),
    )

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """As LLaVA-NeXT, and the frames of videos; the newline behind a video belongs to its last frame."""
        in_video = self.in_video(model, mask, inputs)
        pictures = super().image_spans(model, mask & ~in_video, inputs)
        return in_prompt_order(pictures, _frames(model, in_video, inputs)) if bool(in_video.any()) else pictures

    def vision_tap(self, model: Any) -> VisionTap | None:
        """As LLaVA-NeXT; signals of a video are pooled as its features are."""
        tap = super().vision_tap(model)
        video = ("get_video_features", functools.partial(_video_tokens, model.model))
        return None if tap is None else replace(tap, video=video)

    def grids(self, config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """As LLaVA-NeXT, the tiled view shrunk to at most N tiles' worth of tokens (``anyres_max_N``).

        In a sample of several images each is an overview and one newline, which is what ``batch_num_images`` tells.
        """
        sizes = inputs.get("image_sizes")
        sizes = [] if sizes is None else sizes.tolist()
        alone = _alone(inputs, len(sizes))
        return [
            _shrunk(config, *tiled_grid(config, size)) if tiled else (1, 0)
            for size, tiled in zip(sizes, alone, strict=True)
        ]

    def tiles(self, config: Any, inputs: Mapping[str, Any]) -> list[int]:
        """As LLaVA-NeXT; one, the overview, where a sample has several images."""
        whole = super().tiles(config, inputs)
        return [n if tiled else 1 for n, tiled in zip(whole, _alone(inputs, len(whole)), strict=True)]

    def pack(self, model: Any, tiles: list[Tensor], sizes: Tensor, newline: Tensor) -> list[Tensor]:
        """The model's layout, which shrinks bilinearly."""
        lines, _ = model.pack_image_features(
            tiles, sizes, image_newline=newline, vision_aspect_ratio=model.config.vision_aspect_ratio
        )
        return list(lines)


def _pooled(config: Any) -> int:
    """Tokens per side of a frame of a video."""
    return -(-_side(config) // 2)


def _frames(model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
    """The frames of every row's videos; ``mask`` has their tokens. Nothing in the inputs says when one is shown."""
    side, features = _pooled(model.config), encoded(inputs, "video")
    if features is None:
        clips, n_frames = inputs["pixel_values_videos"].shape[:2]
        lengths = [n_frames * side * side + 1] * clips
    else:
        lengths = [len(video) for video in features]
    spans: list[list[ImageSpan]] = []
    for row in videos_by_length(mask, lengths):
        spans.append([])
        for clip, (_, columns) in enumerate(row):
            shown = columns[:-1].split(side * side)
            for index, frame in enumerate(shown):
                last = index == len(shown) - 1
                spans[-1].append(
                    ImageSpan(
                        columns[-frame.numel() - 1 :] if last else frame,
                        grid=None if last else (side, side),
                        lay_out=functools.partial(_lay_out_frame, side),
                        frame=Frame(clip, index),
                    )
                )
    return spans


def _lay_out_frame(side: int, span: ImageSpan) -> tuple[View, ...]:
    """The grid; a newline behind it shows nothing. The processor stretches a frame into its square."""
    return (View("picture", np.arange(side * side).reshape(side, side), WHOLE),)


def _video_tokens(
    model: Any, patches: Mapping[str, Tensor], _args: tuple[Any, ...], inputs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """(P, *) signals of all frames' patches -> (N, *) of all videos' tokens, pooled by the model's own code.

    The newline gets the mean of the frame that it ends.
    """
    # Transformers 5.14 calls the frames by the pictures' name.
    clips, n_frames = inputs["pixel_values_videos" if "pixel_values_videos" in inputs else "pixel_values"].shape[:2]
    cells = _side(model.config) ** 2
    made = {}
    for name, values in patches.items():
        frames = values.float().unflatten(0, (clips * n_frames, -1))[:, -cells:]
        pooled = model.apply_pooling(frames.flatten(2) if frames.ndim > 2 else frames[:, :, None])
        video = pooled.unflatten(0, (clips, n_frames))
        newline = video[:, -1].mean(dim=1, keepdim=True)
        made[name] = torch.cat((video.flatten(1, 2), newline), dim=1).reshape(-1, *values.shape[1:])
    return made


def _alone(inputs: Mapping[str, Any], n: int) -> list[bool]:
    """Of ``n`` images, whether each is the only one of its sample; all are where nothing is said."""
    counts = inputs.get("batch_num_images")
    return [True] * n if counts is None else [c == 1 for c in counts.tolist() for _ in range(c)]


def _shrunk(config: Any, rows: int, columns: int) -> tuple[int, int]:
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * _side(config) ** 2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
