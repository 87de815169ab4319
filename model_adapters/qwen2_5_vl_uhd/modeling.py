"""Qwen2.5-VL whose vision tower makes one patch of every 2 x 2 behind an early block; all else is the stock model.

What follows from the tower being Qwen2.5-VL's, which LLaVA-UHD v4 does not say:

* Blocks behind the compressor keep their windows in pixels, hence a fourth of the patches in each; RoPE keeps the
  distances between patches.
* The tower's own 2 x 2 merger follows as before, so that a visual token shows 4 x 4 patches
  (``vision_config.spatial_merge_size`` is 4, and pictures are resized to whole such tokens).
* M-RoPE numbers rows and columns in steps of two, as the decoder knows them: the same place in a picture has the same
  position as in the model that this one was made from.
* Each half of the compressor has a scale per channel that is zero in the beginning, so that an untrained one averages
  2 x 2 patches, and nothing else.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLPatchMerger,
    Qwen2_5_VLVisionBlock,
    apply_rotary_pos_emb_vision,
)

STEP = 2  # former patches a side of a compressed one
CELL = STEP * STEP


class UhdV4VisionConfig(Qwen2_5_VLVisionConfig):
    """Qwen2.5-VL's, and how many blocks stand before the compressor (of the published 27 blocks, 7)."""

    model_type = "uhd_v4_vision"

    spatial_merge_size: int = 4
    compress_after: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        """Raises ValueError: no block before or behind the compressor, or another merger than 2 x 2 behind it."""
        super().__post_init__(**kwargs)
        if not 0 < self.compress_after < self.depth:
            raise ValueError(
                f"compress_after {self.compress_after} must leave a block of {self.depth} on either side: "
                f"1 to {self.depth - 1}"
            )
        if self.spatial_merge_size != STEP * STEP:
            raise ValueError(
                f"spatial_merge_size must be {STEP * STEP}, {STEP} of the compressor times {STEP} of the merger, got "
                f"{self.spatial_merge_size}"
            )


class UhdV4Config(Qwen2_5_VLConfig):
    """Qwen2.5-VL's with another tower."""

    model_type = "uhd_v4"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": UhdV4VisionConfig, "text_config": Qwen2_5_VLTextConfig}
    sub_configs_defaults: ClassVar[dict[str, Any]] = sub_configs  # as newer releases of transformers call it


class Compressor(nn.Module):
    """2 x 2 patches to one: attention among the four, then their mean plus an MLP that sees all four.

    ``y = mean(x) + b * MLP(norm2(x) of the four, side by side)`` of ``x = patches + a * attention(norm1(patches))``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.num_heads = config.num_heads
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate_proj, self.up_proj = (nn.Linear(CELL * width, CELL * hidden) for _ in range(2))
        self.down_proj = nn.Linear(CELL * hidden, width)
        self.attention_scale, self.mlp_scale = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    @torch.no_grad()
    def start(self, block: Any, scale: float = 0.0) -> None:
        """Weights of a block of the tower: its attention, and its MLP four times along the diagonal.

        With a ``scale`` of 0 the four are averaged; with 1 this is the mean of what the block, its attention held to
        2 x 2 patches, makes of them.
        """
        for ours, theirs in (("norm1", "norm1"), ("norm2", "norm2"), ("qkv", "attn.qkv"), ("proj", "attn.proj")):
            self.get_submodule(ours).load_state_dict(block.get_submodule(theirs).state_dict())
        for name in ("gate_proj", "up_proj"):
            single, fused = getattr(block.mlp, name), getattr(self, name)
            fused.weight.copy_(torch.block_diag(*[single.weight] * CELL))
            fused.bias.copy_(single.bias.repeat(CELL))
        self.down_proj.weight.copy_(block.mlp.down_proj.weight.repeat(1, CELL) / CELL)
        self.down_proj.bias.copy_(block.mlp.down_proj.bias)
        self.attention_scale.fill_(scale)
        self.mlp_scale.fill_(scale)

    def forward(self, cells: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(C, 4, E) of 2 x 2 patches each, with their (C, 4, D) RoPE, to (C, E)."""
        mixed = cells + self.attention_scale * self._attention(self.norm1(cells), cos, sin)
        beside = self.norm2(mixed).flatten(1)
        fused = self.down_proj(nn.functional.silu(self.gate_proj(beside)) * self.up_proj(beside))
        result: Tensor = mixed.mean(1) + self.mlp_scale * fused
        return result

    def _attention(self, cells: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(cells).flatten(0, 1).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, cos.flatten(0, 1), sin.flatten(0, 1))
        by_cell = (part.unflatten(0, (-1, CELL)).transpose(1, 2) for part in (query, key, value))
        found = nn.functional.scaled_dot_product_attention(*by_cell)
        mixed: Tensor = self.proj(found.transpose(1, 2).flatten(2))
        return mixed


def cells_of(patches: Tensor) -> Tensor:
    """(P, *) patches, 4 x 4 of a visual token after another, row by row -> (P / 4, 4, *) by 2 x 2, row by row."""
    grid = patches.unflatten(0, (-1, STEP, STEP, STEP, STEP))  # token, row of cells, row in it, column, column in it
    return grid.transpose(2, 3).flatten(3, 4).flatten(0, 2)


class CompressingBlock(Qwen2_5_VLVisionBlock):
    """A stock block, and the compressor behind it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.compressor = Compressor(config)

    def forward(self, hidden_states: Tensor, *args: Any, position_embeddings: Any, **kwargs: Any) -> Tensor:
        """(P, E) patches to (P / 4, E)."""
        whole = super().forward(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        result: Tensor = self.compressor(*map(cells_of, (whole, *position_embeddings)))
        return result


class CompressedBlock(Qwen2_5_VLVisionBlock):
    """A stock block on compressed patches: segments a fourth as long, each patch with the RoPE of its cell's first.

    Only differences of positions count, and those between first patches are those between the cells' centres.
    """

    def forward(
        self,
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        *args: Any,
        position_embeddings: Any,
        max_seqlen: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(P / 4, E), where the tower's own arguments are those of P patches."""
        if max_seqlen is not None:
            kwargs["max_seqlen"] = max_seqlen // CELL
        first = tuple(cells_of(part)[:, 0] for part in position_embeddings)
        result: Tensor = super().forward(hidden_states, cu_seqlens // CELL, *args, position_embeddings=first, **kwargs)
        return result


class UhdV4VisionModel(Qwen2_5_VisionTransformerPretrainedModel):
    """The stock tower with a compressor behind a block, and its merger, of 2 x 2 patches, on compressed ones."""

    config_class = UhdV4VisionConfig
    _no_split_modules: ClassVar[list[str]] = ["Qwen2_5_VLVisionBlock", "CompressingBlock", "CompressedBlock"]

    def __init__(self, config: UhdV4VisionConfig) -> None:
        super().__init__(config)
        kinds = [Qwen2_5_VLVisionBlock] * config.depth
        kinds[config.compress_after - 1 :] = [CompressingBlock] + [CompressedBlock] * (
            config.depth - config.compress_after
        )
        self.blocks = nn.ModuleList(kind(config) for kind in kinds)
        self.merger = Qwen2_5_VLPatchMerger(config.out_hidden_size, config.hidden_size, STEP)
        self.post_init()

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        """As the stock tower's.

        Raises:
            ValueError: a picture whose sides are not whole visual tokens.
        """
        side = self.spatial_merge_size
        odd = [(h, w) for _, h, w in grid_thw.tolist() if h % side or w % side]
        if odd:
            raise ValueError(
                f"pictures of {' and '.join(f'{h} x {w}' for h, w in odd)} patches cannot be compressed: both sides "
                f"must be multiples of {side}. The model's own processor resizes pictures so"
            )
        return super().forward(hidden_states, grid_thw=grid_thw, **kwargs)


class UhdV4Model(Qwen2_5_VLModel):
    """The stock model with that tower, and positions in steps of two inside pictures."""

    config_class = UhdV4Config

    def __init__(self, config: UhdV4Config) -> None:
        super().__init__(config)
        self.visual = UhdV4VisionModel._from_config(config.vision_config)
        self.post_init()

    def get_rope_index(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(3, B, S) positions and (B, 1) what follows the last one less the length, as the stock model's."""
        positions, deltas = super().get_rope_index(input_ids, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        for row, ids in enumerate(input_ids):
            there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[row].bool()
            visual = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
            positions[:, row, there] = stretched(positions[:, row, there], visual[there])
            deltas[row] = positions[:, row, there].max() + 1 - there.sum()
        return positions, deltas


def stretched(positions: Tensor, visual: Tensor) -> Tensor:
    """(3, S) positions of a row, time, rows and columns, with pictures twice as wide and high and text moved on.

    Args:
        visual: (S,) bool; each run is a picture or a video, as the stock model numbers them.
    """
    result, shift = positions.clone(), 0
    starts = [0, *((visual[1:] != visual[:-1]).nonzero().flatten() + 1).tolist(), visual.numel()]
    for start, end in itertools.pairwise(starts):
        run = positions[:, start:end]
        result[:, start:end] += shift
        if start < end and visual[start]:
            place = run[1:] - run[1:].min()
            result[1:, start:end] += (STEP - 1) * place
            shift += (STEP - 1) * (int(place.max()) + 1)
    return result


class UhdV4ForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """The stock model with a language head around `UhdV4Model`."""

    config_class = UhdV4Config

    def __init__(self, config: UhdV4Config) -> None:
        super().__init__(config)
        self.model = UhdV4Model(config)
        self.post_init()
