"""Qwen2.5-VL: M-RoPE, windowed vision tower, native resolution with a 2x2 patch merger.

Paper: https://arxiv.org/abs/2502.13923
Classes: transformers' Qwen2_5_VLForConditionalGeneration (5.14 to 5.23 tested).
Prompts: VLMEvalKit's Qwen2VLPromptMixin, and https://github.com/FireRedTeam/IVC-Prune @ 03afd9c for grounding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ivcp_eval.benchmarks.boxes import smart_resize
from ivcp_eval.interface import WHOLE, Checkpoint, Frame, ImageSpan, QuestionKind, VisionTap, grid_view
from ivcp_eval.interface.ops import budget
from model_adapters._shrink import shrunk_grid
from model_adapters._transformers import AbstractTransformersAdapter, encoded, image_runs
from model_adapters._videos import in_prompt_order, per_video, row_repeats, videos_by_length
from model_adapters._vision import CLIP, Normalised, qwen_tap

if TYPE_CHECKING:
    from torch import Tensor

STRETCHED = functools.partial(grid_view, covers=WHOLE)  # a picture is resized to whole merge units


class Adapter(AbstractTransformersAdapter):
    """Wiring of Qwen2.5-VL."""

    model_types = ("qwen2_5_vl",)
    position_axes = 3
    closing_tokens = 1  # <|vision_end|>
    no_videos = ""
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint(
            "tiny",
            local="lab/tiny/model",
            methods={"ivc_prune": {"layer": 2}},  # chosen on the validation split: results/tiny_cut_layer.csv
            max_new_tokens=24,
            benchmarks=("embedded",),
            note="laboratory model trained on generated scenes; says nothing of LVLMs",
        ),
        Checkpoint(
            "tiny2",
            local="lab/tiny2/model",
            max_new_tokens=24,
            benchmarks=("tiny2_grounding", "tiny2_short"),
            note="laboratory model of 256 visual tokens, taught through text only; see its card",
        ),
        Checkpoint("qwen25", "Qwen/Qwen2.5-VL-7B-Instruct"),
        Checkpoint("qwen25_3b", "Qwen/Qwen2.5-VL-3B-Instruct"),
        Checkpoint("qwen25_32b", "Qwen/Qwen2.5-VL-32B-Instruct"),
        Checkpoint("qwen25_72b", "Qwen/Qwen2.5-VL-72B-Instruct"),
    )
    box_format = "qwen2_5_vl"
    pixels: ClassVar[Normalised] = CLIP
    # The limits of the released grounding configuration (config.py:1112-1134 of the reference below).
    min_pixels: ClassVar[int | None] = 4 * 28 * 28
    max_pixels: ClassVar[int | None] = 16384 * 28 * 28

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """Runs of <|image_pad|>; ``image_grid_thw`` lists the images of the whole batch in the same order.

        Where `generate` has encoded the images before the forward, only the M-RoPE positions still show the grids. A
        video is cut into its grid steps, each of which shows two frames.
        """
        in_video = self.in_video(model, mask, inputs)
        pictures = self._pictures(model, mask & ~in_video, inputs)
        return in_prompt_order(pictures, self._steps(model, in_video, inputs)) if bool(in_video.any()) else pictures

    def token_grid(self, model: Any, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """(steps, rows, columns) of the visual tokens that a prompt shows of a picture or video of so many patches."""
        merge = model.config.vision_config.spatial_merge_size
        t, height, width = grid
        return t, height // merge, width // merge

    def _pictures(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        runs = [image_runs(row) for row in mask]
        thw = inputs.get("image_grid_thw")
        if thw is None:
            return _spans_by_position(runs, inputs.get("position_ids"))
        grids = iter(_in_row_order([self.token_grid(model, grid) for grid in thw.tolist()], runs))
        return [[ImageSpan(run, grid=next(grids)[1:], lay_out=STRETCHED) for run in row] for row in runs]

    def _steps(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """The grid steps of every row's videos, as one run of placeholders or a run each; ``mask`` has theirs."""
        thw, features = inputs.get("video_grid_thw"), encoded(inputs, "video")
        sizes = None if thw is None else [self.token_grid(model, grid) for grid in thw.tolist()]
        lengths = [len(video) for video in features or ()] if sizes is None else [t * h * w for t, h, w in sizes]
        rows = videos_by_length(mask, lengths)
        repeats = row_repeats(inputs.get("input_ids"), mask)
        given = inputs.get("second_per_grid_ts")
        given = [] if given is None else [float(seconds) for seconds in given]
        paces = per_video(given, [len(row) for row in rows], repeats)
        spans: list[list[ImageSpan]] = []
        for index, (row, pace) in enumerate(zip(rows, paces, strict=True)):
            spans.append([])
            for clip, ((number, columns), seconds) in enumerate(zip(row, pace, strict=True)):
                if sizes is None:
                    t, *grid = _grid_by_position(columns, index, inputs.get("position_ids"))
                else:
                    t, *grid = sizes[number]
                spans[-1] += [
                    ImageSpan(
                        step,
                        grid=(grid[0], grid[1]),
                        lay_out=STRETCHED,
                        frame=Frame(clip, number, None if seconds is None else number * seconds),
                    )
                    for number, step in enumerate(columns.chunk(t))
                ]
        return spans

    def pixel_options(self, min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
        """``size`` of the image processor, whose edges are areas in spite of their names."""
        if min_pixels is None or max_pixels is None:
            raise ValueError("set both min_pixels and max_pixels, or neither for the published limits")
        return {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}

    def vision_tap(self, model: Any) -> VisionTap | None:
        """The last block with full attention: a window's attention says nothing of the whole image."""
        tower = getattr(model.model, "visual", None)
        return None if tower is None else qwen_tap(tower, self.pixels)

    def shrunk_size(self, processor: Any, size: tuple[int, int], share: float) -> tuple[int, int] | None:
        """Whole merge units, and ``min_pixels`` of them at least, so that the processor leaves the result as it is."""
        images = processor.image_processor
        unit = images.patch_size * images.merge_size
        limits = images.size
        height, width = smart_resize(size[1], size[0], unit, limits["shortest_edge"], limits["longest_edge"])
        rows, columns = height // unit, width // unit
        grids = (shrunk_grid(rows, columns, n) for n in range(budget(share, rows * columns), rows * columns + 1))
        return next((c * unit, r * unit) for r, c in grids if r * c * unit * unit >= limits["shortest_edge"])

    def prompt(self, kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
        """The wording of Qwen's published evaluation."""
        return qwen_prompt(kind, question, options, hint)

    def box_frame(self, processor: Any, inputs: Mapping[str, Tensor], sample: int) -> tuple[int, int] | None:
        """Boxes are pixels of the resized image; exact for one image per sample, which grounding has."""
        _, rows, columns = inputs["image_grid_thw"][sample].tolist()
        patch = processor.image_processor.patch_size
        return columns * patch, rows * patch


def qwen_prompt(kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
    """Qwen2-VL's and Qwen2.5-VL's evaluation prompts."""
    if kind == "grounding":
        return f"\nLocate {question} and output the bbox coordinates in JSON format."
    if kind == "mcq":
        lines = [f"Hint: {hint}"] if hint else []
        lines.append(f"Question: {question}")
        if options:
            lines += ["Options:", *(f"{letter}. {text}" for letter, text in options.items())]
            chinese = any("\u4e00" <= character <= "\u9fff" for character in "".join(lines))
            lines.append(
                "请直接回答选项字母。" if chinese else "Please select the correct answer from the options above."
            )
        return "\n".join(lines)
    if kind == "yes_no":
        return f"{question} Please answer yes or no."
    return f"{question}\nPlease try to answer the question with short words or phrases if possible."


def _spans_by_position(runs: list[list[Tensor]], position_ids: Tensor | None) -> list[list[ImageSpan]]:
    """Images with the grid that their positions (3 or 4, B, S) show; None where there are none, or only text's."""
    if position_ids is None or position_ids.ndim != 3 or position_ids.shape[0] < 3:
        return [[ImageSpan(run) for run in row] for row in runs]
    positions, spans = position_ids[-2:].cpu(), []  # rows, columns
    for index, row in enumerate(runs):
        seen = [positions[:, index, run] for run in row]
        sizes = [_distinct(at) for at in seen]
        grids = [(h, w) if h * w == run.numel() else None for (h, w), run in zip(sizes, row, strict=True)]
        spans.append([ImageSpan(run, grid=grid, lay_out=STRETCHED) for run, grid in zip(row, grids, strict=True)])
    return spans


def _distinct(positions: Tensor) -> tuple[int, int]:
    """How many rows and columns (2, N) positions have, however far apart."""
    return positions[0].unique().numel(), positions[1].unique().numel()


def _grid_by_position(columns: Tensor, row: int, position_ids: Tensor | None) -> tuple[int, int, int]:
    """(t, h, w) of a video's tokens, of whose grid only the positions (3 or 4, B, S) of its first run are left."""
    if position_ids is not None and position_ids.ndim == 3 and position_ids.shape[0] >= 3:
        run = columns[: int(((columns - columns[0]) == torch.arange(columns.numel())).sum())]
        h, w = _distinct(position_ids[-2:, row].cpu()[:, run])
        if columns.numel() % (h * w) == 0:
            return columns.numel() // (h * w), h, w
    raise ValueError(
        f"the grid of a video of {columns.numel()} tokens is not known: pass video_grid_thw, or the 3-D position_ids "
        "that `generate` makes of it"
    )


def _in_row_order(sizes: list[tuple[int, int, int]], runs: list[list[Tensor]]) -> list[tuple[int, int, int]]:
    """(t, h, w) of every run, row by row.

    Beam search repeats each row R times and, depending on the transformers release, repeats the grids image by image
    or not at all; both are undone here.
    """

    def fits(candidate: list[tuple[int, int, int]], rows: list[list[Tensor]]) -> bool:
        return [t * h * w for t, h, w in candidate] == [run.numel() for row in rows for run in row]

    if fits(sizes, runs):
        return sizes
    for repeats in (r for r in range(2, len(runs) + 1) if len(runs) % r == 0):
        for candidate in (sizes[::repeats], sizes):
            if fits(candidate, runs[::repeats]):
                unread = iter(candidate)
                rows = [[next(unread) for _ in row] for row in runs[::repeats]]
                return [size for row in rows for _ in range(repeats) for size in row]
    raise ValueError(
        f"image_grid_thw asks for images of {[t * h * w for t, h, w in sizes]} tokens, "
        f"the prompt holds runs of {[run.numel() for row in runs for run in row]}"
    )
