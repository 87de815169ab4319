"""Qwen2.5-VL with a second, small set of visual tokens for each picture or grid step ("frame"); all else is stock.

What the paper says: n learnable tokens a frame (8, 16 or 32) go through the tower beside the patches, with MLPs of
their own; an asymmetric mask lets them see the patches, and patches never see them; tokens of the frames of a video
attend to each other over time. What it leaves open, or what follows from Qwen2.5-VL, is ours:

* The n tokens are a grid of ``standby_rows`` x ``standby_columns``, never finer than the picture's own tokens. Each has
  a cell of the picture, and in the tower's and in the decoder's RoPE the place of the token in the cell's middle. So
  text stands at the same positions whichever set is shown.
* A token begins as the mean of its cell's patch embeddings plus the learnt one. Norms and attention are the
  block's, which stays as it was; in every block, windowed or not, a token sees all patches and tokens of its frame.
* Over time the tokens of one place attend to those of their own frame and of earlier ones, once, behind the last block.
* What comes out is the mean of the cell's tokens of the full set plus, scaled per channel, a merger's output; the
  scale is 0 in the beginning. An untrained small set is thus exactly the full one averaged over cells.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLMLP,
    Qwen2_5_VLPatchMerger,
    apply_rotary_pos_emb_vision,
)

from model_adapters._vision import window_order

MODES = ("focus", "standby", "both")
attention = nn.functional.scaled_dot_product_attention


class PointsVisionConfig(Qwen2_5_VLVisionConfig):
    """Qwen2.5-VL's, the small set's grid, and which set prompts show."""

    model_type = "points_long_vision"

    mode: str = "focus"
    standby_rows: int = 4
    standby_columns: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        """Raises ValueError: an unknown mode, or no tokens."""
        super().__post_init__(**kwargs)
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if min(self.standby_rows, self.standby_columns) < 1:
            raise ValueError(
                f"the small set must have a row and a column at least, got standby_rows {self.standby_rows} and "
                f"standby_columns {self.standby_columns}"
            )


class PointsConfig(Qwen2_5_VLConfig):
    """Qwen2.5-VL's with another tower."""

    model_type = "points_long"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": PointsVisionConfig, "text_config": Qwen2_5_VLTextConfig}
    sub_configs_defaults: ClassVar[dict[str, Any]] = sub_configs  # as newer releases of transformers call it


@dataclass
class PointsOutput(BaseModelOutputWithPooling):
    """The stock tower's, and the small set.

    Attributes:
        standby: (M, E), all pictures' and all steps' one after the other; None in the mode "focus".
    """

    standby: Tensor | None = None


def middles(most: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(n,) of a grid of (rows, columns) visual tokens those in the middle of the cells of ``most`` rows and columns."""
    at = []
    for cells, size in zip(most, grid, strict=True):
        n = min(cells, size)
        at.append(((2 * torch.arange(n) + 1) * size) // (2 * n))
    return (at[0][:, None] * grid[1] + at[1]).flatten()


def pooling(most: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(n, rows * columns) weights of the mean over every cell, which share a row or column that neither holds alone."""
    sides = []
    for cells, size in zip(most, grid, strict=True):
        n = min(cells, size)
        weights = torch.zeros(n, size)
        for cell in range(n):
            start, end = cell * size // n, -(-(cell + 1) * size // n)
            weights[cell, start:end] = 1 / (end - start)
        sides.append(weights)
    return torch.kron(*sides)


def shown(mode: str, most: tuple[int, int], grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """What a prompt shows of a picture or video of (steps, rows, columns) visual tokens.

    Returns:
        (N,) the place of each token shown among those of the full set, and (N,) bool, whether it is of the full set.
    """
    steps, rows, columns = grid
    full, few = torch.arange(rows * columns), middles(most, (rows, columns))
    parts = {"focus": [full], "standby": [few], "both": [full, few]}[mode]
    of_full = torch.cat([torch.full_like(part, int(part is full)) for part in parts]).bool()
    places = torch.arange(steps)[:, None] * rows * columns + torch.cat(parts)
    return places.flatten(), of_full.repeat(steps)


@dataclass
class Heard:
    """What the blocks computed of the patches, in the order of the windows.

    Attributes:
        embedded: (P, E) patches as they enter the first block. rope: their cos and sin, (P, D) each.
        qkv: by the block's number, its (P, 3 E) queries, keys and values.
    """

    embedded: Tensor = field(default_factory=lambda: torch.empty(0))
    rope: tuple[Tensor, ...] = ()
    qkv: dict[int, Tensor] = field(default_factory=dict)


class Standby(nn.Module):
    """The small set: its tokens, what they have of their own in every block, and how they become embeddings."""

    def __init__(self, config: PointsVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.most = (config.standby_rows, config.standby_columns)
        self.merge = config.spatial_merge_size
        self.num_heads = config.num_heads
        self.window = config.window_size // config.spatial_merge_size // config.patch_size
        self.tokens = nn.Parameter(torch.zeros(*self.most, width))
        self.mlps = nn.ModuleList(Qwen2_5_VLMLP(config, bias=True) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.merger = Qwen2_5_VLPatchMerger(config.out_hidden_size, width, config.spatial_merge_size)
        self.time_scale = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.zeros(config.out_hidden_size))

    @torch.no_grad()
    def start(self, tower: Any) -> None:
        """Weights of a stock tower: its MLPs, its merger, and for the attention over time that of its last block."""
        for mlp, block in zip(self.mlps, tower.blocks, strict=True):
            mlp.load_state_dict(block.mlp.state_dict())
        self.merger.load_state_dict(tower.merger.state_dict())
        last = tower.blocks[-1]
        for ours, theirs in ((self.norm, last.norm1), (self.qkv, last.attn.qkv), (self.proj, last.attn.proj)):
            ours.load_state_dict(theirs.state_dict())

    def forward(self, tower: Any, heard: Heard, merged: Tensor, grids: list[tuple[int, int, int]]) -> Tensor:
        """(M, E) embeddings of the small set.

        Args:
            merged: (N, E) embeddings of the full set, row by row. grids: steps, rows and columns of its tokens.
        """
        frames = [(rows, columns) for t, rows, columns in grids for _ in range(t)]
        sizes = [rows * columns for rows, columns in frames]
        weights = [pooling(self.most, frame).to(merged.device) for frame in frames]
        counts = [len(part) for part in weights]
        place = window_order(grids, self.window).argsort().to(merged.device)  # of each token in the windows' order
        starts = [0, *itertools.accumulate(sizes)][:-1]
        middle = torch.cat([middles(self.most, frame) + start for frame, start in zip(frames, starts, strict=True)])
        patch = place[middle.to(place.device)] * self.merge**2
        few_rope = tuple(part[patch] for part in heard.rope)

        units = heard.embedded.unflatten(0, (-1, self.merge**2)).mean(1)[place]
        learnt = [self.tokens[: min(self.most[0], r), : min(self.most[1], c)].flatten(0, 1) for r, c in frames]
        few = averaged(units, sizes, weights) + torch.cat(learnt)
        patches = [n * self.merge**2 for n in sizes]
        for number, (block, mlp) in enumerate(zip(tower.blocks, self.mlps, strict=True)):
            query, key, value = self._heads(block.attn.qkv(block.norm1(few)), few_rope)
            _, full_key, full_value = self._heads(heard.qkv[number], heard.rope)
            mixed = [
                attention(q, torch.cat((s, k), 1), torch.cat((t, v), 1))
                for q, k, v, s, t in zip(
                    *(part.split(counts, 1) for part in (query, key, value)),
                    *(part.split(patches, 1) for part in (full_key, full_value)),
                    strict=True,
                )
            ]
            few = few + block.attn.proj(torch.cat(mixed, 1).transpose(0, 1).flatten(1))
            few = few + mlp(block.norm2(few))
        videos, first = [], 0
        for t, _, _ in grids:
            n = counts[first]
            videos.append((t, n))
            first += t
        clips = few.split([t * n for t, n in videos])
        few = torch.cat([self._over_time(clip, t) for clip, (t, _) in zip(clips, videos, strict=True)])
        made = self.merger(few.repeat_interleave(self.merge**2, dim=0))
        return (averaged(merged, sizes, weights) + self.scale * made).to(merged.dtype)

    def _heads(self, qkv: Tensor, rope: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(heads, N, D) queries, keys and values of (N, 3 E), turned by (N, D) cos and sin."""
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *rope)
        return query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)

    def _over_time(self, few: Tensor, steps: int) -> Tensor:
        """(steps * n, E): every token attends to those of its place in its own and in earlier frames."""
        clip = few.unflatten(0, (steps, -1)).transpose(0, 1)  # place, step, width
        heads = self.qkv(self.norm(clip)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        mixed = self.proj(attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2))
        return (clip + self.time_scale * mixed).transpose(0, 1).flatten(0, 1)


def averaged(values: Tensor, sizes: list[int], weights: list[Tensor]) -> Tensor:
    """(M, *) means over cells of (N, *) values, ``sizes`` of them a frame, by (n, size) ``weights`` each."""
    frames = zip(weights, values.split(sizes), strict=True)
    return torch.cat([torch.tensordot(cells.to(values.dtype), frame, dims=1) for cells, frame in frames])


class PointsVisionModel(Qwen2_5_VisionTransformerPretrainedModel):
    """The stock tower, to which the small set listens: nothing that it computes of patches changes."""

    config_class = PointsVisionConfig

    def __init__(self, config: PointsVisionConfig) -> None:
        super().__init__(config)
        self.standby = Standby(config)
        self.post_init()

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """As the stock tower's, with ``standby`` where prompts show the small set."""
        if self.config.mode == "focus":
            return super().forward(hidden_states, grid_thw=grid_thw, **kwargs)
        with listening(self.blocks) as heard:
            whole = super().forward(hidden_states, grid_thw=grid_thw, **kwargs)
        grids = token_grids(grid_thw, self.spatial_merge_size)
        few = self.standby(self, heard, whole.pooler_output, grids)
        return PointsOutput(last_hidden_state=whole.last_hidden_state, pooler_output=whole.pooler_output, standby=few)


@contextmanager
def listening(blocks: Sequence[Any]) -> Iterator[Heard]:
    """What the blocks compute of the patches while the block runs."""
    heard = Heard()

    def first(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard.embedded = args[0] if args else kwargs["hidden_states"]
        heard.rope = kwargs["position_embeddings"]

    def keep(number: int, _module: Any, _args: Any, output: Tensor) -> None:
        heard.qkv.setdefault(number, output)  # other listeners compute the same again

    handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [
        block.attn.qkv.register_forward_hook(functools.partial(keep, number)) for number, block in enumerate(blocks)
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def token_grids(grid_thw: Tensor, merge: int) -> list[tuple[int, int, int]]:
    """Steps, rows and columns of visual tokens, of (K, 3) grids of patches."""
    return [(t, h // merge, w // merge) for t, h, w in grid_thw.tolist()]


class PointsModel(Qwen2_5_VLModel):
    """The stock model with that tower; prompts show the set of tokens that the tower's mode names."""

    config_class = PointsConfig

    def __init__(self, config: PointsConfig) -> None:
        super().__init__(config)
        self.visual = PointsVisionModel._from_config(config.vision_config)
        self.post_init()

    @property
    def _sets(self) -> tuple[str, tuple[int, int]]:
        vision = self.config.vision_config
        return vision.mode, (vision.standby_rows, vision.standby_columns)

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any) -> Any:
        """As the stock model's, of the set that is shown."""
        return self._shown(super().get_image_features(pixel_values, image_grid_thw, **kwargs), image_grid_thw)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As the stock model's, of the set that is shown."""
        return self._shown(super().get_video_features(pixel_values_videos, video_grid_thw, **kwargs), video_grid_thw)

    def _shown(self, outputs: Any, grid_thw: Any) -> Any:
        mode, most = self._sets
        if mode == "focus":
            return outputs
        grids = token_grids(grid_thw, self.visual.spatial_merge_size)
        counts = [len(shown("standby", most, grid)[0]) for grid in grids]
        few = outputs.standby.split(counts)
        if mode == "both":
            few = [
                torch.cat([part.unflatten(0, (grid[0], -1)) for part in parts], 1).flatten(0, 1)
                for grid, *parts in zip(grids, outputs.pooler_output, few, strict=True)
            ]
        outputs.pooler_output = tuple(few)
        return outputs

    def get_rope_index(self, input_ids: Tensor, mm_token_type_ids: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(3, B, S) positions and (B, 1) what follows the last one less the length: those of the full set's places."""
        if self._sets[0] == "focus":
            return super().get_rope_index(input_ids, mm_token_type_ids=mm_token_type_ids, **kwargs)
        mask, rest = kwargs.pop("attention_mask", None), dict(kwargs)
        kinds = {1: rest.pop("image_grid_thw", None), 2: rest.pop("video_grid_thw", None)}
        paces, used = rest.pop("second_per_grid_ts", None), {1: 0, 2: 0}
        positions = torch.zeros(3, *input_ids.shape, dtype=input_ids.dtype, device=input_ids.device)
        deltas = []
        for row, ids in enumerate(input_ids):
            there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[row].bool()
            runs = runs_of(mm_token_type_ids[row, there])
            grids = {}
            for kind, given in kinds.items():
                n = sum(kind == found for found, _ in runs)
                grids[kind] = None if given is None or not n else given[used[kind] : used[kind] + n]
                used[kind] += n
            row_paces = None if paces is None or grids[2] is None else paces[used[2] - len(grids[2]) : used[2]]
            whole, kept, *_ = self._whole(ids[there], runs, grids)
            found, _ = super().get_rope_index(
                whole[0][None],
                mm_token_type_ids=whole[1][None],
                image_grid_thw=grids[1],
                video_grid_thw=grids[2],
                second_per_grid_ts=row_paces,
                **rest,
            )
            positions[:, row, there] = found[:, 0, kept]
            deltas.append(found.max() + 1 - len(kept))
        return positions, torch.stack(deltas)[:, None].to(input_ids.device)

    def sets_of(self, input_ids: Tensor, mm_token_type_ids: Tensor, **grids: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token of the one row (1, S): (S,) bool whether it is of a full set, (S,) its frame, -1 for text."""
        kinds = {1: grids.get("image_grid_thw"), 2: grids.get("video_grid_thw")}
        return self._whole(input_ids[0], runs_of(mm_token_type_ids[0]), kinds)[2:]

    def _whole(
        self, ids: Tensor, runs: list[tuple[int, int]], grids: dict[int, Any]
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor, Tensor]:
        """The prompt that shows all tokens, of one that shows those of the mode.

        Returns:
            Its ids and kinds of token, the columns in it of this prompt's tokens, and of each of these whether it is of
            a full set and the number of its frame.
        """
        mode, most = self._sets
        unread = {
            kind: iter(token_grids(given, self.visual.spatial_merge_size))
            for kind, given in grids.items()
            if given is not None
        }
        whole, kinds, kept, full, frames = [], [], [], [], []
        start = length = count = 0
        for kind, n in runs:
            part, size = ids[start : start + n], n
            places, of_full, frame = torch.arange(n), torch.zeros(n, dtype=torch.bool), torch.full((n,), -1)
            if kind:
                grid = next(unread[kind])
                places, of_full = shown(mode, most, grid)
                if len(places) != n:
                    raise ValueError(
                        f"the prompt has {n} placeholders for {grid} visual tokens (steps, rows, columns), of which "
                        f"the mode {mode!r} shows {len(places)}; encode it with this checkpoint's adapter in that mode"
                    )
                size = grid[0] * grid[1] * grid[2]
                part = part[:1].repeat(size)
                frame = torch.arange(grid[0]).repeat_interleave(n // grid[0]) + count
                count += grid[0]
            whole.append(part)
            kinds.append(torch.full((size,), kind, dtype=torch.int, device=ids.device))
            kept.append(places + length)
            full.append(of_full)
            frames.append(frame)
            start, length = start + n, length + size
        columns, of_set, of_frame = (torch.cat(parts).to(ids.device) for parts in (kept, full, frames))
        return (torch.cat(whole), torch.cat(kinds)), columns, of_set, of_frame


def runs_of(kinds: Tensor) -> list[tuple[int, int]]:
    """(kind, length) of the runs of a row (S,) of kinds of token: 0 text, 1 a picture, 2 a video."""
    return [(kind, len(list(run))) for kind, run in itertools.groupby(kinds.tolist())]


class PointsForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """The stock model with a language head around `PointsModel`."""

    config_class = PointsConfig

    def __init__(self, config: PointsConfig) -> None:
        super().__init__(config)
        self.model = PointsModel(config)
        self.post_init()
