"""Batched forward pass of a stock Qwen2.5-VL for training on many images of one size.

Same parameters and same mathematics as ``Qwen2_5_VLForConditionalGeneration.forward`` (a test holds them
equal); only the bookkeeping differs:

* the vision tower treats equal-sized windows of a whole batch as one batched attention, where the stock tower
  loops over windows;
* several questions about an image share the tokens of the image: every question sees the prefix (system turn
  and image) and itself, at the positions it would have alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ivcp_eval.lab.tiny.processor import IMAGE_MEAN, IMAGE_STD, PATCH_SIZE

WINDOW_CELLS = 4


@dataclass(frozen=True)
class VisionLayout:
    """Order of the cells of one image size inside the vision tower.

    Attributes:
        order: (cells,) raster index of each cell in tower order, windows of equal size side by side.
        inverse: (cells,) tower index of each cell in raster order.
        groups: (windows, patches per window) of each run of equal-sized windows.
        rows, columns: (patches,) patch coordinates in tower order.
    """

    order: Tensor
    inverse: Tensor
    groups: tuple[tuple[int, int], ...]
    rows: Tensor
    columns: Tensor


@lru_cache(maxsize=64)
def vision_layout(
    cell_rows: int, cell_columns: int, window: int = WINDOW_CELLS, device: torch.device | None = None
) -> VisionLayout:
    """Return the layout of an image of ``cell_rows`` x ``cell_columns`` visual tokens in windows of ``window``."""
    windows: dict[int, list[list[int]]] = {}
    for top in range(0, cell_rows, window):
        for left in range(0, cell_columns, window):
            cells = [
                row * cell_columns + column
                for row in range(top, min(top + window, cell_rows))
                for column in range(left, min(left + window, cell_columns))
            ]
            windows.setdefault(len(cells), []).append(cells)
    order = torch.tensor([cell for group in windows.values() for window in group for cell in window])
    groups = tuple((len(group), 4 * size) for size, group in windows.items())
    inner = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    rows = (2 * (order // cell_columns)[:, None] + inner[:, 0]).flatten()
    columns = (2 * (order % cell_columns)[:, None] + inner[:, 1]).flatten()
    return VisionLayout(order.to(device), torch.argsort(order).to(device), groups, rows.to(device), columns.to(device))


def to_patches(images: Tensor, patch_size: int = PATCH_SIZE) -> Tensor:
    """Turn uint8 images (batch, height, width, 3) into normalised patches (batch, cells, 4, values), cells row by row.

    The processor stores every still picture twice (temporal patch size 2); the copy is left out here and the
    two halves of the patch embedding are added instead.
    """
    batch, height, width, _ = images.shape
    rows, columns = height // (2 * patch_size), width // (2 * patch_size)
    mean = torch.tensor(IMAGE_MEAN, dtype=torch.float32, device=images.device)
    std = torch.tensor(IMAGE_STD, dtype=torch.float32, device=images.device)
    x = ((images.float() / 255 - mean) / std).view(batch, rows, 2, patch_size, columns, 2, patch_size, 3)
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(batch, rows * columns, 4, 3 * patch_size * patch_size)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm with statistics in float32."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + epsilon)
    return y.to(x.dtype) * weight.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings; the last dimension is the head size."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos[..., :half], sin[..., :half]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU, silu(gate) * up, in float32."""
    y = gate.float()
    return (y / (1 + torch.exp(-y)) * up.float()).to(gate.dtype)


@dataclass(frozen=True)
class Kernels:
    """The element-wise steps, which are most of the time on a CPU with bfloat16 matrix units."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
    gated: Callable[[Tensor, Tensor], Tensor] = gated


EAGER = Kernels()


def compiled_kernels() -> Kernels:
    """Return the same steps fused by ``torch.compile`` (needs a C++ compiler; some seconds once)."""
    return Kernels(*(torch.compile(f, dynamic=True) for f in (rms_norm, rotate, gated)))


def _norm(x: Tensor, norm: Any, kernels: Kernels) -> Tensor:
    return kernels.rms_norm(x, norm.weight, norm.variance_epsilon)


def _mlp(mlp: Any, x: Tensor, kernels: Kernels) -> Tensor:
    return mlp.down_proj(kernels.gated(mlp.gate_proj(x), mlp.up_proj(x)))


def vision_forward(visual: Any, images: Tensor, dtype: torch.dtype = torch.float32, kernels: Kernels = EAGER) -> Tensor:
    """Return the visual tokens (batch, cells, text hidden size) of equal-sized uint8 images, cells in raster order."""
    return merge(visual, tower_features(visual, images, dtype, kernels), kernels)


def tower_features(visual: Any, images: Tensor, dtype: torch.dtype, kernels: Kernels = EAGER) -> Tensor:
    """What the tower's blocks say of each cell: (batch, cells, 4 x tower width), cells in raster order."""
    size = int(visual.patch_size)
    window = int(visual.window_size) // (2 * size)
    layout = vision_layout(images.shape[1] // (2 * size), images.shape[2] // (2 * size), window, images.device)
    weight = visual.patch_embed.proj.weight.sum(2).flatten(1)
    patches = to_patches(images, size).to(dtype)[:, layout.order].flatten(1, 2)
    x = F.linear(patches, weight.to(dtype))
    inverse_frequency = visual.rotary_pos_emb.inv_freq.float()
    angles = torch.cat((layout.rows[:, None] * inverse_frequency, layout.columns[:, None] * inverse_frequency), dim=-1)
    cos, sin = angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)
    for index, block in enumerate(visual.blocks):
        windows = ((1, x.shape[1]),) if index in visual.fullatt_block_indexes else layout.groups
        x = x + _vision_attention(block.attn, _norm(x, block.norm1, kernels), cos, sin, windows, kernels)
        x = x + _mlp(block.mlp, _norm(x, block.norm2, kernels), kernels)
    return x.unflatten(1, (-1, 4)).flatten(2)[:, layout.inverse]


def merge(visual: Any, features: Tensor, kernels: Kernels = EAGER) -> Tensor:
    """Visual tokens (..., text width) of the tower's features (..., 4 x tower width)."""
    return visual.merger.mlp(_norm(features.unflatten(-1, (4, -1)), visual.merger.ln_q, kernels).flatten(-2))


def _vision_attention(
    attention: Any, x: Tensor, cos: Tensor, sin: Tensor, windows: Sequence[tuple[int, int]], kernels: Kernels
) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = attention.qkv(x).view(batch, length, 3, attention.num_heads, attention.head_dim).unbind(2)
    q = kernels.rotate(q, cos, sin)
    k = kernels.rotate(k, cos, sin)
    lengths = [count * size for count, size in windows]
    outputs = []
    for (count, size), *parts in zip(windows, *(t.split(lengths, dim=1) for t in (q, k, v)), strict=True):
        qw, kw, vw = (t.unflatten(1, (count, size)).flatten(0, 1).transpose(1, 2) for t in parts)
        mixed = F.scaled_dot_product_attention(qw, kw, vw, scale=attention.scaling)
        outputs.append(mixed.transpose(1, 2).reshape(batch, count * size, -1))
    return attention.proj(torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0])


@dataclass(frozen=True)
class TextLayout:
    """Layout of a training sequence: prefix, then groups of equally long question slots.

    Attributes:
        prefix: tokens of the system turn, the image and the tokens around it.
        slots: (count, length) of each group of slots.
        positions: (3, tokens) M-RoPE positions of every token.
    """

    prefix: int
    slots: tuple[tuple[int, int], ...]
    positions: Tensor


def text_layout(
    before: int, cell_rows: int, cell_columns: int, after: int, slots: tuple[tuple[int, int], ...]
) -> TextLayout:
    """Lay out ``before`` tokens, the image, ``after`` tokens and the question slots, each at its lone position."""
    cells = torch.arange(cell_rows * cell_columns)
    image = torch.stack((torch.zeros_like(cells), cells // cell_columns, cells % cell_columns)) + before
    start = before + max(cell_rows, cell_columns)
    pieces = [torch.arange(before).expand(3, -1), image, (torch.arange(after) + start).expand(3, -1)]
    for count, length in slots:
        pieces.append((torch.arange(length) + start + after).repeat(count).expand(3, -1))
    return TextLayout(before + len(cells) + after, slots, torch.cat(pieces, dim=1))


@dataclass
class TextOutput:
    """What the decoder returns to the trainer.

    Attributes:
        hidden: (batch, slot tokens, hidden) after the final norm.
        layers: output (batch, tokens, hidden) of each layer asked for.
        attention: for each layer asked for and each group of slots, every head's attention to the prefix and to
            the slot, (batch, slots, heads, tokens of a slot, prefix + tokens of a slot).
    """

    hidden: Tensor
    layers: dict[int, Tensor]
    attention: dict[int, list[Tensor]]


def text_forward(
    text: Any,
    embeddings: Tensor,
    layout: TextLayout,
    keep: Sequence[int] = (),
    watch: Sequence[int] = (),
    kernels: Kernels = EAGER,
) -> TextOutput:
    """Run the decoder layers and the final norm.

    Args:
        text: stock ``Qwen2_5_VLTextModel``.
        embeddings: (batch, tokens, hidden) token embeddings with the visual tokens in place.
        layout: the sequence's layout.
        keep: layers (but the last) whose output is wanted too.
        watch: layers whose attention is wanted too.
        kernels: element-wise steps, plain or compiled.
    """
    cos, sin = text.rotary_emb(embeddings, layout.positions[:, None])
    cos, sin = cos[0, :, None], sin[0, :, None]
    x = embeddings
    kept: dict[int, Tensor] = {}
    watched: dict[int, list[Tensor]] = {index: [] for index in watch}
    for index, layer in enumerate(text.layers):
        # Nothing reads the prefix behind the last layer, so that layer computes only its keys and values.
        last = index == len(text.layers) - 1
        y = _norm(x, layer.input_layernorm, kernels)
        mixed = _text_attention(layer.self_attn, y, cos, sin, layout, last, kernels, watched.get(index))
        x = (x[:, layout.prefix :] if last else x) + mixed
        x = x + _mlp(layer.mlp, _norm(x, layer.post_attention_layernorm, kernels), kernels)
        if index in keep:
            kept[index] = x
    return TextOutput(_norm(x, text.norm, kernels), kept, watched)


@lru_cache(maxsize=64)
def _causal(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size, size), -1e9 if dtype == torch.float32 else -1e4, dtype=dtype).triu(1)


def _text_attention(
    attention: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: TextLayout,
    last: bool,
    kernels: Kernels,
    watched: list[Tensor] | None,
) -> Tensor:
    """Attention of every token to the prefix and, in a slot, to the slot; the slots' outputs only if ``last``."""
    size, key_heads = attention.head_dim, attention.num_key_value_heads
    query_heads = attention.num_heads
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = F.linear(x, torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
    q, k, v = qkv.unflatten(-1, (-1, size)).split((query_heads, key_heads, key_heads), dim=2)
    # Query heads that share a key head are folded into one axis: (batch, key heads, group, tokens, size).
    q = kernels.rotate(q, cos * attention.scaling, sin * attention.scaling)
    q = q.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4)
    k = kernels.rotate(k, cos, sin).transpose(1, 2)
    lengths = [layout.prefix, *(count * slot for count, slot in layout.slots)]
    q_prefix, *q_slots = q.split(lengths, dim=3)
    k_prefix, *k_slots = k.split(lengths, dim=2)
    v_prefix, *v_slots = v.transpose(1, 2).split(lengths, dim=2)
    outputs = []
    if not last:
        scores = _fold(q_prefix, k_prefix.transpose(-1, -2)) + _causal(layout.prefix, x.dtype)
        outputs.append(_fold(torch.softmax(scores, dim=-1), v_prefix))
    for (count, slot), own_q, own_k, own_v in zip(layout.slots, q_slots, k_slots, v_slots, strict=True):
        # (batch, key heads, count, group, slot, size) for attention inside the slots.
        split_q = own_q.unflatten(3, (count, slot)).transpose(2, 3)
        own = _fold(split_q, own_k.unflatten(2, (count, slot)).transpose(-1, -2)) + _causal(slot, x.dtype)
        shared = _fold(own_q, k_prefix.transpose(-1, -2)).unflatten(3, (count, slot)).transpose(2, 3)
        weights = torch.softmax(torch.cat((shared, own), dim=-1), dim=-1)
        if watched is not None:
            watched.append(weights.transpose(1, 2).flatten(2, 3))
        to_prefix, to_own = weights.split((layout.prefix, slot), dim=-1)
        from_own = _fold(to_own, own_v.unflatten(2, (count, slot))).transpose(2, 3).flatten(3, 4)
        outputs.append(from_own + _fold(to_prefix.transpose(2, 3).flatten(3, 4), v_prefix))
    mixed = torch.cat(outputs, dim=3) if len(outputs) > 1 else outputs[0]
    return attention.o_proj(mixed.permute(0, 3, 1, 2, 4).flatten(2))


def _fold(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (..., group, rows, a) by (..., a, b) with the group folded into the rows (one larger product)."""
    group, rows = left.shape[-3], left.shape[-2]
    return torch.matmul(left.flatten(-3, -2), right).unflatten(-2, (group, rows))
