"""Where things are in a DeepSeek-VL2 model, and in its language model alone.

Boxes are 0 to 999 of the image; DeepSeek's evaluation is not published, so coordinates that add up to less than 4 are
fractions of the image, as in IVC-Prune's (https://github.com/FireRedTeam/IVC-Prune @ 03afd9c).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.interface import GREEDY, Checkpoint, ImageSpan, QuestionKind, Signal, VisionTap
from model_adapters._shrink import shrunk_to_count
from model_adapters._transformers import AbstractTransformersAdapter, rotate_half, split_heads
from model_adapters._vision import vit_tap
from model_adapters.deepseek_vl2.layout import lay_out, n_thumbnail, n_tokens, padding_cells, spread

if TYPE_CHECKING:
    from torch import Tensor


class Adapter(AbstractTransformersAdapter):
    """Wiring of DeepSeek-VL2, and of DeepseekV2 language models used alone (then `prune` needs ``image_mask=``)."""

    model_types = ("deepseek_vl_v2", "deepseek_v2")
    no_videos = "its model takes pictures only"
    checkpoints = (
        Checkpoint("deepseek_vl2_small", "deepseek-ai/deepseek-vl2-small", note="16B, the one IVC-Prune was run on"),
        Checkpoint("deepseek_vl2_tiny", "deepseek-ai/deepseek-vl2-tiny", note="3B, multi-head attention"),
        Checkpoint("deepseek_vl2", "deepseek-ai/deepseek-vl2", note="27B"),
    )
    box_format = "deepseek_vl2"
    generation = {**GREEDY, "max_new_tokens": 2048}  # noqa: RUF012 (declared a ClassVar by the base class)

    def image_mask(self, model: Any, inputs: Mapping[str, Any]) -> Tensor | None:
        """None for a language model alone: it does not know which tokens show an image."""
        if self.text_model(model) is model.model:
            return None
        return super().image_mask(model, inputs)

    def image_spans(self, model: Any, mask: Tensor, inputs: Mapping[str, Any]) -> list[list[ImageSpan]]:
        """Images by their tiles, thumbnail, separator, newlines and all; padding is that of the thumbnail.

        Without ``images_spatial_crop`` (embeddings, language models alone) each run of visual tokens is an image.
        """
        crops, sizes = inputs.get("images_spatial_crop"), inputs.get("image_sizes")
        if crops is None:
            return super().image_spans(model, mask, inputs)
        spans = []
        for row, tiles in enumerate(crops.tolist()):
            tiles = [(w, h) for w, h in tiles if w and h]
            lengths = [n_tokens(model.config.view_side, tile) for tile in tiles]
            columns = mask[row].nonzero().flatten()
            if columns.numel() != sum(lengths):
                raise ValueError(
                    f"images_spatial_crop makes images of {lengths} tokens in row {row}, its mask has {columns.numel()}"
                )
            pieces = columns.split(lengths) if lengths else ()
            shown = [None] * len(tiles) if sizes is None else sizes[row].tolist()[: len(tiles)]
            spans.append([_span(model.config, *image) for image in zip(pieces, tiles, shown, strict=True)])
        return spans

    def projection(self, layer: Any, signal: Signal) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """MLA: values are the v part of ``kv_b_proj``; keys and queries are [without RoPE, rotary] head vectors.

        MLA has no module that holds a whole key: the rotary part is in ``kv_a_proj_with_mqa``, shared by the heads,
        the rest is ``kv_b_proj`` of the normed latent. Both are computed from the former's output.
        """
        attention = layer.self_attn
        if not hasattr(attention, "kv_b_proj"):
            return super().projection(layer, signal)
        if signal == "value":
            return attention.kv_b_proj, lambda states: _expanded(attention, states)[1]
        if signal == "key":
            return attention.kv_a_proj_with_mqa, lambda states: _mla_keys(attention, states)
        if attention.q_proj is not None:
            return attention.q_proj, lambda states: split_heads(states, attention.qk_head_dim)

        def low_rank(states: Tensor) -> Tensor:
            return split_heads(attention.q_b_proj(attention.q_a_layernorm(states)), attention.qk_head_dim)

        return attention.q_a_proj, low_rank

    def rotate(self, states: Tensor, position_embeddings: Any) -> Tensor:
        """MLA: turn the last R dimensions; the others carry no position.

        ``position_embeddings``: (1, n, R/2) complex (DeepseekV2: neighbouring pairs turn), or (cos, sin) of (1, n, R):
        DeepseekV3, which first sorts the pairs into halves, where R is less than D; else Llama's.
        """
        if isinstance(position_embeddings, torch.Tensor):
            angles = position_embeddings[0]
            plain, rotary = _partial(states, 2 * angles.shape[-1])
            turned = torch.view_as_complex(rotary.float().unflatten(-1, (-1, 2)).contiguous()) * angles
            return torch.cat((plain, torch.view_as_real(turned).flatten(-2).to(states.dtype)), dim=-1)
        cos, sin = (part[0].to(states.dtype) for part in position_embeddings)
        plain, rotary = _partial(states, cos.shape[-1])
        if plain.shape[-1]:
            rotary = torch.cat((rotary[..., 0::2], rotary[..., 1::2]), dim=-1)
        return torch.cat((plain, rotary * cos + rotate_half(rotary) * sin), dim=-1)

    def unsupported(self, model: Any, signal: Signal) -> str | None:
        """With latent attention the cache holds no keys, and values are no projection of the hidden states."""
        latent = hasattr(self.text_model(model).layers[0].self_attn, "kv_b_proj")
        if latent and signal == "cached_key":
            return "its cache holds compressed latents that all heads share, not keys"
        if latent and signal == "raw_value":
            return "its values are projected from a normed latent, not from the hidden states"
        return super().unsupported(model, signal)

    def vision_tap(self, model: Any) -> VisionTap | None:
        """SigLIP's last block; a token gets the mean of its 2 x 2 patches, a newline the mean of its row."""
        if self.text_model(model) is model.model:
            return None
        tower, config = model.model.vision_tower, model.config
        tap = vit_tap(tower, -1, class_token=False)

        def tokens(values: Mapping[str, Tensor], args: tuple[Any, ...], _kwargs: Any) -> dict[str, Tensor]:
            crops = [(w, h) for row in args[1].tolist() for w, h in row if w and h]
            return {name: _of_tokens(patches, crops, config) for name, patches in values.items()}

        return replace(tap, tower=model.model.layout, tokens=tokens)

    def config(self, source: str) -> Any:
        """Our own configuration class, which transformers' AutoConfig does not know."""
        from model_adapters.deepseek_vl2.configuration import DeepseekVL2Config

        return DeepseekVL2Config.from_pretrained(source)

    def shrunk_size(self, processor: Any, size: tuple[int, int], share: float) -> tuple[int, int] | None:
        """A picture of the same proportions; thumbnail and one tile are the least."""

        def count(sizes: list[tuple[int, int]]) -> list[int]:
            return [n_tokens(processor.view_side, processor.tiles(smaller)) for smaller in sizes]

        return shrunk_to_count(count, size, share)

    def load_parts(
        self,
        source: str,
        pixels: Mapping[str, Any],
        *,
        dtype: torch.dtype,
        device: str,
        attention: str,
        quantization_config: Any = None,
        **common: Any,
    ) -> tuple[Any, Any]:
        """Our own classes on the published files; their remote code is never run.

        Raises:
            ValueError: a variant that is not implemented, tensors that are missing, left over or of another shape, or
                weights that transformers is to quantise, which knows none of these classes.
        """
        if quantization_config is not None:
            raise ValueError("weights of DeepSeek-VL2 cannot be stored by bitsandbytes here; use int8 or int4")
        from model_adapters.deepseek_vl2.loading import load_checkpoint

        return load_checkpoint(source, revision=common["revision"], dtype=dtype, device=device, attention=attention)

    def pixel_options(self, min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
        """None: tiles follow the checkpoint's ``candidate_resolutions``."""
        if min_pixels is not None or max_pixels is not None:
            raise ValueError(
                f"got {min_pixels=}, {max_pixels=}: DeepSeek-VL2 has no pixel limits, its processor chooses from the "
                "checkpoint's candidate_resolutions. Leave both out."
            )
        return {}

    def prompt(self, kind: QuestionKind, question: str, options: Mapping[str, str], hint: str = "") -> str | None:
        """Grounding as released IVC-Prune asks for it; elsewhere VLMEvalKit has no wording of its own."""
        return f"Locate <|ref|>{question}<|/ref|> in the given image." if kind == "grounding" else None

    def encode(self, processor: Any, conversations: list[list[Mapping[str, Any]]]) -> Mapping[str, Tensor]:
        """One user turn each; an image stands as ``<image>`` and a line break, as in VLMEvalKit.

        VLMEvalKit's special case for MMMU (numbered placeholders, the first image doubled in size) is not repeated.
        """
        if any("video" in part for parts in conversations for part in parts):
            raise ValueError(f"got a video, but {self.no_videos}; pass its frames as images")
        turns, images = [], []
        for parts in conversations:
            texts = [f"{processor.image_token}\n" if "image" in part else part["text"] for part in parts]
            turns.append([{"role": "user", "content": "".join(texts)}])
            images.append([part["image"] for part in parts if "image" in part])
        encoded: Mapping[str, Tensor] = processor(turns, images)
        return encoded


def _partial(states: Tensor, rotary: int) -> tuple[Tensor, Tensor]:
    """(..., D) -> the dimensions before the last ``rotary``, and those."""
    first, second = states.split([states.shape[-1] - rotary, rotary], dim=-1)
    return first, second


def _span(config: Any, columns: Tensor, tiles: tuple[int, int], size: tuple[int, int] | None) -> ImageSpan:
    side, head = config.view_side, config.global_view_pos == "head"
    thumbnail = n_thumbnail(side)
    rest = columns.numel() - thumbnail
    padding: tuple[int, ...] = ()
    cell = config.vision_config.patch_size * config.projector_config["downsample_ratio"]
    if size is not None:
        cells = padding_cells((size[0], size[1]), side, config.vision_config.image_size, cell)
        padding = tuple(index + (0 if head else rest) for index in cells)
    views = (thumbnail + 1, rest - 1) if head else (rest, thumbnail)  # the separator belongs to the view before it
    shown = None if size is None else (int(size[0]), int(size[1]))
    laid_out = functools.partial(lay_out, side, head, shown, config.vision_config.image_size, cell)
    return ImageSpan(columns, tiles=tiles, padding=padding, views=views, lay_out=laid_out)


def _of_tokens(patches: Tensor, crops: list[tuple[int, int]], config: Any) -> Tensor:
    """(P, *) signals of all views' patches -> (N, *) of all images' tokens."""
    views = sum(1 + w * h for w, h in crops)
    side, ratio = config.view_side, config.projector_config["downsample_ratio"]
    grid = patches.float().unflatten(0, (views, -1))
    across = round(grid.shape[1] ** 0.5)
    cell = (torch.arange(across)[:, None] // ratio * side + torch.arange(across) // ratio).flatten().to(grid.device)
    pooled = grid.new_zeros(views, side * side, *grid.shape[2:]).index_add(1, cell, grid)
    counts = cell.bincount(minlength=side * side)
    pooled = pooled / counts.view(-1, *[1] * (grid.ndim - 2))
    head = config.global_view_pos == "head"
    images = pooled.split([1 + w * h for w, h in crops])
    return torch.cat([spread(image, tiles, head) for image, tiles in zip(images, crops, strict=True)])


def _expanded(attention: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """(keys without RoPE, values), (B, H, S, *) each, from the output of ``kv_b_proj``, (B, 1, S, *) or (B, S, *)."""
    states = states.reshape(states.shape[0], states.shape[-2], states.shape[-1])
    sizes = [attention.qk_nope_head_dim, attention.v_head_dim]
    keys, values = split_heads(states, sum(sizes)).split(sizes, dim=-1)
    return keys, values


def _mla_keys(attention: Any, states: Tensor) -> Tensor:
    """(B, H, S, nope + rope) keys before RoPE from the output of ``kv_a_proj_with_mqa``."""
    latent, rotary = states.split([attention.kv_lora_rank, attention.qk_rope_head_dim], dim=-1)
    plain, _ = _expanded(attention, attention.kv_b_proj(attention.kv_a_layernorm(latent)))
    return torch.cat((plain, rotary[:, None].expand(-1, plain.shape[1], -1, -1)), dim=-1)
