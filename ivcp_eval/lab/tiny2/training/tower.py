"""The vision tower in training: a batched forward on pictures of one size, and its pre-training on *what* alone.

The pre-training stands in for CLIP: linear heads read shape, colour, texture and digits off each visual token.
No head asks where something is, so the tower is taught no coordinates; afterwards it is frozen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivcp_eval.lab.tiny.processor import IMAGE_MEAN, IMAGE_STD
from ivcp_eval.lab.tiny.scenes import COLOURS, SHAPES, SIGN
from ivcp_eval.lab.tiny.training.fast import EAGER, Kernels, vision_layout
from ivcp_eval.lab.tiny2.processor import PATCH_SIZE, WINDOW_CELLS
from ivcp_eval.lab.tiny2.scenes import CELL, TEXTURES, Scene, cell_owner

IGNORED = -100
SHAPE_CLASSES = ("background", *SHAPES, SIGN)
COLOUR_CLASSES = ("background", *COLOURS, "white")


def to_patches(images: Tensor) -> Tensor:
    """Turn uint8 pictures (batch, height, width, 3) into normalised patches (batch, cells, 4, 192), row by row.

    A still picture fills both halves of a temporal patch; the halves of the patch embedding are added instead.
    """
    batch, height, width, _ = images.shape
    mean = torch.tensor(IMAGE_MEAN, dtype=torch.float32, device=images.device)
    std = torch.tensor(IMAGE_STD, dtype=torch.float32, device=images.device)
    x = (images.float() / 255 - mean) / std
    x = x.view(batch, height // CELL, 2, PATCH_SIZE, width // CELL, 2, PATCH_SIZE, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x.reshape(batch, (height // CELL) * (width // CELL), 4, 3 * PATCH_SIZE * PATCH_SIZE)


def tower_features(visual: Any, images: Tensor, dtype: torch.dtype, kernels: Kernels = EAGER) -> Tensor:
    """What the tower's blocks say of each cell: (batch, cells, 4 x tower width), cells in raster order."""
    layout = vision_layout(images.shape[1] // CELL, images.shape[2] // CELL, WINDOW_CELLS, images.device)
    weight = visual.patch_embed.proj.weight.sum(2).flatten(1)
    patches = to_patches(images).to(dtype)[:, layout.order].flatten(1, 2)
    x = F.linear(patches, weight.to(dtype))
    inverse_frequency = visual.rotary_pos_emb.inv_freq.float()
    angles = torch.cat((layout.rows[:, None] * inverse_frequency, layout.columns[:, None] * inverse_frequency), dim=-1)
    cos, sin = angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)
    for index, block in enumerate(visual.blocks):
        windows = ((1, x.shape[1]),) if index in visual.fullatt_block_indexes else layout.groups
        y = kernels.rms_norm(x, block.norm1.weight, block.norm1.variance_epsilon)
        x = x + _attention(block.attn, y, cos, sin, windows, kernels)
        y = kernels.rms_norm(x, block.norm2.weight, block.norm2.variance_epsilon)
        x = x + block.mlp.down_proj(kernels.gated(block.mlp.gate_proj(y), block.mlp.up_proj(y)))
    return x.unflatten(1, (-1, 4)).flatten(2)[:, layout.inverse]


def merge(visual: Any, features: Tensor, kernels: Kernels = EAGER) -> Tensor:
    """Visual tokens (..., text width) of the tower's features (..., 4 x tower width)."""
    norm = visual.merger.ln_q
    x = kernels.rms_norm(features.unflatten(-1, (4, -1)), norm.weight, norm.variance_epsilon)
    return visual.merger.mlp(x.flatten(-2))


def _attention(
    attention: Any, x: Tensor, cos: Tensor, sin: Tensor, windows: tuple[tuple[int, int], ...], kernels: Kernels
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


class WhatHeads(nn.Module):
    """Linear heads on visual tokens that ask what is there; used in the pre-training and then thrown away."""

    sizes = (len(SHAPE_CLASSES), len(COLOUR_CLASSES), len(TEXTURES), 20)

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.what = nn.Linear(hidden_size, sum(self.sizes))

    def losses(self, tokens: Tensor, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses of shape, colour, texture and digits of tokens (batch, cells, width)."""
        logits = dict(zip(("shape", "colour", "texture", "digits"), self._split(tokens), strict=True))
        # Empty cells are most of a picture: they share a fifth of the weight.
        weight = torch.where(targets["shape"] > 0, 1.0, 0.2).flatten()
        losses = {}
        for name in ("shape", "colour"):
            each = F.cross_entropy(logits[name].flatten(0, 1), targets[name].flatten(), reduction="none")
            losses[name] = (each * weight).sum() / weight.sum()
        for name in ("texture", "digits"):
            if (targets[name] != IGNORED).any():
                classes = logits[name].unflatten(-1, (-1, 10)) if name == "digits" else logits[name]
                losses[name] = F.cross_entropy(classes.flatten(0, -2), targets[name].flatten())
        return losses

    @torch.no_grad()
    def accuracies(self, tokens: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
        """Share of right answers, of cells with an object for shape, colour and texture."""
        logits = dict(zip(("shape", "colour", "texture", "digits"), self._split(tokens), strict=True))
        covered, found = targets["shape"] > 0, {}
        for name, scores in logits.items():
            classes = scores.unflatten(-1, (-1, 10)) if name == "digits" else scores
            chosen = targets[name] != IGNORED
            if name != "digits":
                chosen &= covered
            if chosen.any():
                found[name] = (classes.argmax(-1) == targets[name])[chosen].float().mean().item()
        empty = logits["shape"].argmax(-1)[~covered] == 0
        return {**found, "empty": empty.float().mean().item()}

    def _split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.what(tokens).float().split(self.sizes, dim=-1)


def what_targets(scenes: list[Scene]) -> dict[str, Tensor]:
    """Classes of what lies under each cell, (batch, cells), digits (batch, cells, 2); -100 where not applicable."""
    columns: dict[str, list[Any]] = {"shape": [], "colour": [], "texture": [], "digits": []}
    for scene in scenes:
        owner, things = cell_owner(scene), scene.objects
        columns["shape"].append(np.array([*(SHAPE_CLASSES.index(o.shape) for o in things), 0])[owner])
        columns["colour"].append(np.array([*(COLOUR_CLASSES.index(o.colour) for o in things), 0])[owner])
        textures = [IGNORED if o.shape == SIGN else TEXTURES.index(o.texture) for o in things]
        columns["texture"].append(np.array([*textures, IGNORED])[owner])
        digits = [[int(d) for d in o.number] or [IGNORED] * 2 for o in things]
        columns["digits"].append(np.array([*digits, [IGNORED] * 2])[owner])
    return {name: torch.from_numpy(np.stack(values)) for name, values in columns.items()}
