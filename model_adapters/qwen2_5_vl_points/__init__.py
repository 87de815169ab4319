"""POINTS-Long's second, small set of visual tokens in Qwen2.5-VL: a few for each picture and each step of a video.

Paper: https://arxiv.org/abs/2604.11627
Differs: the tower and the decoder are Qwen2.5-VL's; `modeling` lists what that changes and what is ours, since the
paper's code and weights are promised and not found. `ivcp lab train points_long --model M` makes weights from a model
of the family Qwen2.5-VL.

A prompt shows, by ``vision_config.mode``, either set or both: ``focus``, all tokens, as the stock model does;
``standby``, the few; ``both``, for `memory.Memory`, which keeps the few when the others are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ivcp_eval.interface import Checkpoint, VisionTap
from model_adapters._transformers import image_runs
from model_adapters.qwen2_5_vl import Adapter as Qwen25Adapter

if TYPE_CHECKING:
    from torch import Tensor

_MADE = "nothing published; `ivcp lab train points_long` makes a folder for --model-path"


@dataclass(frozen=True)
class Sets:
    """What a prompt shows of a picture, as the tower's configuration says it; ``standby``: rows and columns."""

    mode: str
    standby: tuple[int, int]

    @classmethod
    def of(cls, config: Any) -> Sets:
        """Of a model's configuration."""
        vision = config.vision_config
        return cls(vision.mode, (vision.standby_rows, vision.standby_columns))


class Adapter(Qwen25Adapter):
    """Wiring of Qwen2.5-VL, with prompts that show the set of tokens that the checkpoint's mode names."""

    model_types = ("points_long",)
    checkpoints: ClassVar[tuple[Checkpoint, ...]] = (
        Checkpoint("points_long", note=f"{_MADE} (its folder focus)"),
        Checkpoint("points_long_standby", note=f"{_MADE} (its folder standby)"),
    )

    def config(self, source: str) -> Any:
        """As the stock one, which has to be told of this architecture."""
        _register()
        return super().config(source)

    def load(self, source: str, **options: Any) -> tuple[Any, Any]:
        """Likewise."""
        _register()
        return super().load(source, **options)

    def load_processor(self, source: str, **options: Any) -> Any:
        """The stock one, which remembers what prompts show."""
        processor = super().load_processor(source, **options)
        processor.sets = Sets.of(self.config(source))
        return processor

    @staticmethod
    def switch(model: Any, processor: Any, mode: str) -> None:
        """Show another set from now on: "focus", "standby" or "both"."""
        model.config.vision_config.mode = mode
        processor.sets = replace(processor.sets, mode=mode)

    def encode(self, processor: Any, conversations: list[list[Mapping[str, Any]]]) -> Mapping[str, Tensor]:
        """As the stock one, with as many placeholders as the mode shows tokens."""
        from model_adapters.qwen2_5_vl_points.modeling import shown

        inputs = dict(super().encode(processor, conversations))
        if processor.sets.mode == "focus":
            return inputs
        merge, ids = processor.image_processor.merge_size, inputs["input_ids"]
        counts: dict[int, Iterator[int]] = {}
        for kind, token in (("image", processor.image_token_id), ("video", processor.video_token_id)):
            grids = inputs.get(f"{kind}_grid_thw", torch.empty(0, 3)).tolist()
            sizes = [(int(t), int(h) // merge, int(w) // merge) for t, h, w in grids]
            counts[token] = iter([len(shown(processor.sets.mode, processor.sets.standby, size)[0]) for size in sizes])
        columns = [_columns(row, mask, counts) for row, mask in zip(ids, inputs["attention_mask"], strict=True)]
        pads = {"input_ids": getattr(processor, "tokenizer", processor).pad_token_id}
        return {
            name: _left_padded([row[at] for row, at in zip(value, columns, strict=True)], pads.get(name, 0))
            if value.shape == ids.shape
            else value
            for name, value in inputs.items()
        }

    def token_grid(self, model: Any, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The few of the small set, where that is what prompts show.

        Raises:
            ValueError: prompts show both sets, among which no method chooses.
        """
        sets = Sets.of(model.config)
        t, rows, columns = super().token_grid(model, grid)
        if sets.mode == "focus":
            return t, rows, columns
        if sets.mode == "both":
            raise ValueError("a prompt that shows both sets of tokens is not pruned; the mode must be focus or standby")
        return t, min(rows, sets.standby[0]), min(columns, sets.standby[1])

    def vision_tap(self, model: Any) -> VisionTap | None:
        """Qwen2.5-VL's; a token of the small set has the mean of what is heard of the tokens of its cell."""
        tap, sets = super().vision_tap(model), Sets.of(model.config)
        if tap is None or sets.mode == "focus":
            return tap
        from model_adapters.qwen2_5_vl_points.modeling import averaged, pooling, token_grids

        stock, merge = tap.tokens, model.config.vision_config.spatial_merge_size

        def tokens(heard: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
            grids = token_grids(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1], merge)
            frames = [(rows, columns) for t, rows, columns in grids for _ in range(t)]
            sizes, weights = [r * c for r, c in frames], [pooling(sets.standby, frame) for frame in frames]
            return {
                name: averaged(values.float(), sizes, [cells.to(values.device) for cells in weights])
                for name, values in stock(heard, args, kwargs).items()
            }

        return replace(tap, tokens=tokens, luma=None)

    def shrunk_size(self, processor: Any, size: tuple[int, int], share: float) -> tuple[int, int] | None:
        """None where only the few are shown: their number does not follow the picture's size."""
        return super().shrunk_size(processor, size, share) if processor.sets.mode == "focus" else None


def _columns(ids: Tensor, mask: Tensor, counts: Mapping[int, Iterator[int]]) -> Tensor:
    """(S',) which columns of a row (S,) make the prompt: each picture's first placeholder as often as it has tokens."""
    columns = mask.nonzero().flatten()
    kept, start = [], 0
    for run in image_runs(torch.isin(ids, torch.tensor(list(counts)))):
        first = int((columns == run[0]).nonzero())
        kept += [columns[start:first], run[:1].repeat(next(counts[int(ids[run[0]])]))]
        start = first + len(run)
    return torch.cat([*kept, columns[start:]])


def _left_padded(rows: list[Tensor], pad: int) -> Tensor:
    length = max(map(len, rows))
    return torch.stack([torch.cat((row.new_full((length - len(row),), pad), row)) for row in rows])


def _register() -> None:
    """Tell transformers' Auto classes of a model type that is not its own; again does no harm."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from model_adapters.qwen2_5_vl_points.modeling import PointsConfig, PointsForConditionalGeneration

    AutoConfig.register(PointsConfig.model_type, PointsConfig, exist_ok=True)
    AutoModelForImageTextToText.register(PointsConfig, PointsForConditionalGeneration, exist_ok=True)
