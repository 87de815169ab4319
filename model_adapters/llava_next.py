"""LLaVA-NeXT (1.6): an overview of the image, then its tiles as one unpadded grid with a newline token per row.

Source: https://llava-vl.github.io/blog/2024-01-30-llava-next/
Classes: transformers' LlavaNextForConditionalGeneration with the ``llava-hf`` checkpoints.
Prompts: VLMEvalKit's LLaVA_Next class, in the chat template of the checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ivcp_eval.interface import WHOLE, Checkpoint, ImageSpan, QuestionKind, View, VisionTap
from model_adapters._prompts import letter_question
from model_adapters._shrink import shrunk_to_count
from model_adapters._transformers import AbstractTransformersAdapter, encoded, image_runs, images_by_length
from model_adapters._vision import feature_tap, newlines_by_row

if TYPE_CHECKING:
    from torch import Tensor

Views = tuple[int, ...]


class Adapter(AbstractTransformersAdapter):
    """Wiring of LLaVA-NeXT."""

    model_types = ("llava_next",)
    no_videos = "its model takes pictures only (LLaVA-NeXT-Video is another)"
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint("llava_next", "llava-hf/llava-v1.6-vicuna-7b-hf"),
        Checkpoint("llava_next_13b", "llava-hf/llava-v1.6-vicuna-13b-hf"),
        Checkpoint("llava_next_mistral", "llava-hf/llava-v1.6-mistral-7b-hf"),
        Checkpoint("llava_next_34b", "llava-hf/llava-v1.6-34b-hf"),
        Checkpoint("llava_next_llama3", "llava-hf/llama3-llava-next-8b-hf"),
    )

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """Images by their lengths (of ``image_sizes``, or already encoded); nothing stands between consecutive ones.

        Newline tokens count as the image's: they stand for its rows.
        """
        side = _side(model.config)
        features_of = encoded(inputs)
        newline = getattr(model.model, "image_newline", None)
        if features_of is None:
            grids = self.grids(model.config, inputs)
        else:
            grids = [_grid_by_newlines(features[side * side :], newline) for features in features_of]
        views = [(side * side, rows * (columns + 1)) for rows, columns in grids]
        rows = images_by_length(mask, [sum(view) for view in views])
        if rows is None:  # a mask given by the user
            return [[ImageSpan(run) for run in image_runs(row)] for row in mask]
        spans = []
        for row, images in zip(mask, rows, strict=True):
            columns = torch.split(row.nonzero().flatten(), [sum(views[i]) for i in images])
            laid_out = [functools.partial(_lay_out, side, *grids[i]) for i in images]
            pairs = zip(columns, images, laid_out, strict=True)
            spans.append([ImageSpan(c, views=views[i], lay_out=lay_out) for c, i, lay_out in pairs])
        return spans

    def vision_tap(self, model: Any) -> VisionTap | None:
        """The block that the projector reads, tile by tile: attention stays inside a tile.

        The model's own ``pack_image_features`` lays the signals out, in place of features, so that what it cuts off
        as padding, shrinks (OneVision: bilinearly) or puts first is the same. A newline, which shows no patch, gets
        the mean of its row.
        """
        tap = feature_tap(model)
        if tap is None:
            return None
        tokens = functools.partial(self._tokens, model.model)
        return replace(tap, tower=model.model, method="get_image_features", tokens=tokens)

    def _tokens(
        self, model: Any, patches: Mapping[str, Tensor], _args: tuple[Any, ...], inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """(P, *) signals of all tiles' patches, class tokens included -> (N, *) of all images' tokens."""
        overview, tiles = _side(model.config) ** 2, self.tiles(model.config, inputs)
        cells = {name: v.float().unflatten(0, (sum(tiles), -1))[:, -overview:] for name, v in patches.items()}
        flat = [v.flatten(2) if v.ndim > 2 else v[:, :, None] for v in cells.values()]
        channels = torch.cat([*flat, torch.zeros_like(flat[0][:, :, :1])], dim=2)  # the last one marks newlines
        newline = torch.zeros_like(channels[0, 0])
        newline[-1] = 1
        lines = self.pack(model, list(channels.split(tiles)), inputs["image_sizes"], newline)
        joined = torch.cat([_filled(line, overview) for line in lines])
        parts = joined[:, :-1].split([v.shape[2] for v in flat], dim=1)
        shapes = {name: v.shape[2:] for name, v in cells.items()}
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def pack(self, model: Any, tiles: list[Tensor], sizes: Tensor, newline: Tensor) -> list[Tensor]:
        """The model's layout: (T, n, C) of every image's tiles and a newline's (C,) -> (N, C) of every image."""
        lines, _ = model.pack_image_features(
            tiles, sizes, model.config.vision_feature_select_strategy, image_newline=newline
        )
        return list(lines)

    def shrunk_size(self, processor: Any, size: tuple[int, int], share: float) -> tuple[int, int] | None:
        """A picture of the same proportions; the overview alone costs 576 tokens (OneVision: 729)."""

        def count(sizes: list[tuple[int, int]]) -> list[int]:
            # Of transformers' processors, the one entry that counts without encoding (serving engines use it, too).
            counted = processor._get_num_multimodal_tokens(image_sizes=[(height, width) for width, height in sizes])
            return list(counted["num_image_tokens"])

        return shrunk_to_count(count, size, share)

    def prompt(self, kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
        """Multiple choice has a wording of its own."""
        return letter_question(question, options, hint) if kind == "mcq" else None

    def views(self, config: Any, inputs: Mapping[str, Any]) -> list[Views]:
        """Tokens of the overview and of the tiled view, newlines included, of every image of the batch."""
        return [(_side(config) ** 2, rows * (columns + 1)) for rows, columns in self.grids(config, inputs)]

    def grids(self, config: Any, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of the tiled view of every image of the batch; a newline stands behind each row."""
        sizes = inputs.get("image_sizes")
        return [tiled_grid(config, size) for size in ([] if sizes is None else sizes.tolist())]

    def tiles(self, config: Any, inputs: Mapping[str, Any]) -> list[int]:
        """Tiles of every image of the batch, the overview included."""
        return [
            1 + rows * columns for rows, columns in (tiling(config, size) for size in inputs["image_sizes"].tolist())
        ]


def _grid_by_newlines(tiled: Tensor, newline: Tensor | None) -> tuple[int, int]:
    """(rows, columns) of an encoded tiled view (n, E), whose rows end in the learned token ``newline`` (E,).

    Without one, one row of n - 1, which adds up to as many tokens.
    """
    n = tiled.shape[0]
    found = [] if newline is None else (tiled == newline.to(tiled)).all(dim=1).nonzero().flatten().tolist()
    width = found[0] + 1 if found else n
    return (n // width, width - 1) if n and n % width == 0 else (1, n - 1)


def _lay_out(side: int, rows: int, columns: int, span: ImageSpan) -> tuple[View, ...]:
    """The tiled view, whose rows end in newlines, and the overview; the processor stretches the picture into both."""
    overview = View("overview", np.arange(side * side).reshape(side, side), WHOLE)
    if columns < 1:  # at most a newline behind the overview
        return (overview,)
    cells = side * side + np.arange(rows * (columns + 1)).reshape(rows, columns + 1)
    return View("tiles", cells[:, :-1], WHOLE), overview


def _filled(line: Tensor, overview: int) -> Tensor:
    """One image's (N, C) signals with newlines filled; the last channel marks them."""
    start = overview if line.shape[0] > overview + 1 else 0  # a lone newline closes the overview itself
    return torch.cat((line[:start], newlines_by_row(line[start:], line[start:, -1] == 1)))


def _side(config: Any) -> int:
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def tiling(config: Any, size: list[int]) -> tuple[int, int]:
    """(rows, columns) of tiles that an image of ``size`` (height, width) is cut into."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return int(rows), int(columns)


def tiled_grid(config: Any, size: list[int]) -> tuple[int, int]:
    """(rows, columns) of the tiled view of an image of ``size`` (height, width), padding removed."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    side = _side(config)
    rows, columns = (side * n for n in tiling(config, size))
    _, rows, columns = unpad_image(torch.empty(0, rows, columns), size).shape
    return rows, columns
