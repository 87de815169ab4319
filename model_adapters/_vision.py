"""Where to listen in the vision towers that families share: plain ViTs, and Qwen's packed and windowed ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ivcp_eval.interface import PatchStates, TowerFacts, VisionTap
from model_adapters._transformers import rotate_half

Normalised: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of red, green and blue by which the published processors normalise pixels."""

CLIP: Normalised = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET: Normalised = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES: Normalised = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
LUMA = (0.299, 0.587, 0.114)  # BT.601

if TYPE_CHECKING:
    from torch import Tensor


def vit_tap(
    tower: Any, own: int, *, class_token: bool, pool: int = 1, normalised: Normalised | None = None
) -> VisionTap:
    """A ViT on a batch of equal images or tiles (CLIP, SigLIP, InternViT).

    Args:
        tower: its forward encodes one batch. own: the block whose output becomes features, negative from the end. The
            blocks' attention has ``q_proj``, ``k_proj`` and, where it has them, ``q_norm``, ``k_norm``.
        class_token: whether token 0 is one; it is no visual token.
        pool: patches per side that become one visual token.
        normalised: how pixels are, where each visual token is a square of them.
    """

    def states(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PatchStates:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        batch, length, _ = hidden.shape
        parts = []
        for name in ("q", "k"):
            projected = getattr(module, f"{name}_proj")(hidden)
            norm = getattr(module, f"{name}_norm", None)
            projected = projected if norm is None else norm(projected)
            parts.append(projected.view(batch * length, -1, module.head_dim).transpose(0, 1))
        return PatchStates(parts[0], parts[1], (length,) * batch, module.scale, class_token)

    def tokens(patches: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        batch = (kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]).shape[0]
        states = {}
        for name, values in patches.items():
            grid = values.unflatten(0, (batch, -1))[:, int(class_token) :]
            side = round(grid.shape[1] ** 0.5)
            if pool > 1:
                blocks = grid.unflatten(1, (side // pool, pool, side // pool, pool))
                grid = blocks.float().mean(dim=(2, 4)).flatten(1, 2)
            states[name] = grid.flatten(0, 1)
        return states

    def luma(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        assert normalised is not None
        grey = brightness(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0], normalised, axis=1)
        patch = tower.config.patch_size
        side = pool * (patch if isinstance(patch, int) else patch[0])
        cells = grey.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)  # tile, row, column, y, x
        return cells.flatten(0, 2).flatten(1)[:, None]

    blocks = [(getattr(layer, "attention", None) or layer.self_attn, layer) for layer in vit_layers(tower)]
    every = range(len(blocks))
    facts = TowerFacts(len(blocks), every[own], tuple(every), class_token)
    shown = None if normalised is None else luma
    return VisionTap(blocks=blocks, facts=facts, tower=tower, states=states, tokens=tokens, luma=shown)


def brightness(pixels: Tensor, normalised: Normalised, axis: int) -> Tensor:
    """(*) float32 brightness, 0 black and 1 white, of pixels with red, green and blue along ``axis``."""
    mean, std, share = torch.tensor((*normalised, LUMA), device=pixels.device)
    return torch.tensordot(pixels.float(), share * std, dims=([axis], [0])) + share @ mean


def mergeable(tap: VisionTap) -> VisionTap:
    """The tap of a CLIP or SigLIP whose patches, each on its own, become visual tokens."""
    return replace(tap, between=[block.layer_norm2 for _, block in tap.blocks])


def feature_tap(model: Any) -> VisionTap | None:
    """The block whose output the projector of a LLaVA family reads (as VisionZip's LLaVA code).

    The class token is what ``vision_feature_select_strategy="default"`` drops; "full" belongs to towers without one.
    None where there is no tower, or no single such block.
    """
    tower, number = getattr(model.model, "vision_tower", None), model.config.vision_feature_layer
    if tower is None or not isinstance(number, int):
        return None
    class_token = model.config.vision_feature_select_strategy == "default"
    return vit_tap(tower, number if number < 0 else number - 1, class_token=class_token)


def newlines_by_row(values: Tensor, newline: Tensor) -> Tensor:
    """(N, *) float32 signals of one view, in which each newline, showing no patch, gets the mean of its row.

    Args:
        values: (N, *) signals, anything at newlines. newline: (N,) bool; each ends its row. One that ends an empty
            row gets the mean of the view.
    """
    flat = values.float()
    row = newline.cumsum(0) - newline.long()
    shown, n_rows = flat[~newline], int(row[-1]) + 1
    totals = flat.new_zeros(n_rows, *flat.shape[1:]).index_add(0, row[~newline], shown)
    counts = row[~newline].bincount(minlength=n_rows).view(-1, *[1] * (flat.ndim - 1))
    means = torch.where(counts > 0, totals / counts.clamp_min(1), shown.mean(0))
    return torch.where(newline.view(-1, *[1] * (flat.ndim - 1)), means[row], flat)


def vit_layers(tower: Any) -> Any:
    """The blocks of a CLIP, SigLIP or InternVL vision model (transformers before 5.20 nests CLIP's deeper)."""
    encoder: Any = getattr(tower, "vision_model", tower).encoder
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


def qwen_tap(tower: Any, normalised: Normalised) -> VisionTap:
    """The tower of Qwen's families: images packed in one sequence, patches grouped by merge unit, 2-D RoPE.

    Its own block is the last, in Qwen2.5-VL the last one whose attention is not windowed (published: also the last).
    The signals of a merge unit's patches are averaged, as in VisionZip's port to Qwen2.5-VL. How the pixels are
    ``normalised`` is the processor's affair.
    """
    windowed = getattr(tower, "fullatt_block_indexes", None) is not None
    whole = sorted(tower.fullatt_block_indexes) if windowed else range(len(tower.blocks))
    window = tower.window_size // tower.spatial_merge_size // tower.patch_size if windowed else None

    def states(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PatchStates:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        lengths = kwargs["cu_seqlens"] if "cu_seqlens" in kwargs else args[1]
        query, key, _ = module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1)).permute(1, 2, 0, 3).unbind(0)
        cos, sin = (part.float() for part in kwargs["position_embeddings"])
        query, key = (x.float() * cos + rotate_half(x.float()) * sin for x in (query, key))
        segments = tuple((lengths[1:] - lengths[:-1]).tolist())
        return PatchStates(query, key, segments, query.shape[-1] ** -0.5)

    def tokens(patches: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        merge = tower.spatial_merge_size
        total = int(grids.prod(-1).sum()) // merge**2  # a block behind a compressor has fewer patches in each unit
        units = {name: v.float().view(total, -1, *v.shape[1:]).mean(dim=1) for name, v in patches.items()}
        if window is None:
            return units
        order = window_order([(t, h // merge, w // merge) for t, h, w in grids.tolist()], window)
        back = order.argsort().to(grids.device)
        return {name: value[back.to(value.device)] for name, value in units.items()}

    def luma(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        patches = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # one merge unit after the other
        shape = (-1, tower.spatial_merge_size**2, 3, tower.config.temporal_patch_size, tower.config.patch_size**2)
        return brightness(patches.reshape(shape), normalised, axis=2).transpose(1, 2).flatten(2)

    blocks = [(block.attn, block) for block in tower.blocks]
    facts = TowerFacts(len(blocks), whole[-1], tuple(whole), class_token=False)
    return VisionTap(blocks=blocks, facts=facts, tower=tower, states=states, tokens=tokens, luma=luma)


def window_order(grids: list[tuple[int, int, int]], side: int) -> Tensor:
    """(N,) merge units of images (t, rows, columns) in the order of Qwen2.5-VL's windows.

    Frame by frame, windows of ``side`` x ``side`` units row by row, units inside a window row by row.
    """
    order, start = [], 0
    for frames, rows, columns in grids:
        t, r, c = torch.meshgrid(*(torch.arange(n) for n in (frames, rows, columns)), indexing="ij")
        place = torch.stack((t, r // side, c // side, r % side, c % side)).flatten(1)
        weight = torch.tensor([rows * columns * side * side, columns * side * side, side * side, side, 1])
        order.append((place * weight[:, None]).sum(0).argsort() + start)
        start += frames * rows * columns
    return torch.cat(order)
