"""Losses of the tiny model's training: answers, and dense targets read off the image tokens.

The dense targets (what lies under each visual token, and where its object's box is) are read by small linear
heads that exist during training only. They teach the tower to see and the first decoder layers to turn grid
positions into pixel coordinates; answers alone carry too little signal per image for a run of an hour.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivcp_eval.lab.tiny.processor import CELL
from ivcp_eval.lab.tiny.training.batches import (
    BEFORE_IMAGE,
    COLOUR_CLASSES,
    IGNORED,
    SHAPE_CLASSES,
    SLOTS,
    Batch,
    encode,
)
from ivcp_eval.lab.tiny.training.fast import EAGER, Kernels, TextOutput, text_forward, vision_forward

#: Decoder layers whose output the dense heads read: the cell's own place, then its object's box.
PLACE_LAYER, BOX_LAYER = 0, 2
#: Decoder layers whose first head is shown where to look while answering.
LOOK_LAYERS = (3, 4)
#: Decoder layer whose second head is shown the right option of a multiple-choice question.
OPTION_LAYER = 5
#: Longest side of an image in cells.
MAX_CELLS = 16


class DenseHeads(nn.Module):
    """Linear heads on visual tokens, used in training and then thrown away."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.seen = nn.Linear(hidden_size, len(SHAPE_CLASSES) + len(COLOUR_CLASSES) + 4 + 20)
        self.place = nn.Linear(hidden_size, 2 * MAX_CELLS)
        self.box = nn.Linear(hidden_size, 4 * 3 * 10)


def vision_losses(heads: DenseHeads, tokens: Tensor, batch: Batch) -> dict[str, Tensor]:
    """Losses of what the vision tower's output says about each cell (shape, colour, box edges, sign digits)."""
    shapes, colours = len(SHAPE_CLASSES), len(COLOUR_CLASSES)
    shape, colour, edges, digits = heads.seen(tokens).float().split((shapes, colours, 4, 20), dim=-1)
    covered = batch.shape > 0
    # Most cells are empty: they share one fifth of the weight.
    weight = torch.where(covered, 1.0, 0.2).flatten()
    losses = {
        "see_shape": (F.cross_entropy(shape.flatten(0, 1), batch.shape.flatten(), reduction="none") * weight).sum(),
        "see_colour": (F.cross_entropy(colour.flatten(0, 1), batch.colour.flatten(), reduction="none") * weight).sum(),
    }
    losses = {name: value / weight.sum() for name, value in losses.items()}
    relative = (batch.boxes - _cell_centres(batch).repeat(1, 1, 2)) / CELL
    losses["see_edges"] = F.smooth_l1_loss(edges[covered], relative[covered], beta=0.2)
    if (batch.digits >= 0).any():
        losses["see_digits"] = F.cross_entropy(digits.unflatten(-1, (2, 10)).flatten(0, 2), batch.digits.flatten())
    return losses


def _cell_centres(batch: Batch) -> Tensor:
    """(1, cells, 2) centre (x, y) of every cell in pixels."""
    rows, columns = batch.images.shape[1] // CELL, batch.images.shape[2] // CELL
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (torch.stack((x, y), dim=-1).flatten(0, 1)[None] + 0.5) * CELL


def place_losses(heads: DenseHeads, kept: dict[int, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Losses of what decoder layers know at the image tokens: the cell's row and column, its object's box digits."""
    start = len(encode(BEFORE_IMAGE))
    cells = batch.shape.shape[1]
    rows, columns = batch.images.shape[1] // CELL, batch.images.shape[2] // CELL
    place = heads.place(kept[PLACE_LAYER][:, start : start + cells]).float().unflatten(-1, (2, MAX_CELLS))
    index = torch.arange(rows * columns)
    target = torch.stack((index // columns, index % columns), dim=-1).expand(place.shape[0], -1, -1)
    losses = {"place": F.cross_entropy(place.flatten(0, 2), target.flatten())}
    covered = batch.shape > 0
    box = heads.box(kept[BOX_LAYER][:, start : start + cells][covered]).float().unflatten(-1, (12, 10))
    values = batch.boxes[covered]
    digits = torch.stack((values // 100, values // 10 % 10, values % 10), dim=-1)
    weight = torch.tensor([1.0, 1.0, 0.3]).expand(digits.shape)
    loss = F.cross_entropy(box.flatten(0, 1), digits.flatten(), reduction="none") * weight.flatten()
    losses["place_box"] = loss.sum() / weight.sum()
    return losses


def answer_logits(
    model: Any, batch: Batch, dtype: torch.dtype, kernels: Kernels = EAGER
) -> tuple[Tensor, Tensor, TextOutput]:
    """Logits at the labelled slot tokens (labels, vocabulary), the visual tokens, and the decoder's output."""
    tokens = vision_forward(model.model.visual, batch.images, dtype, kernels)
    embeddings = model.get_input_embeddings()(batch.ids).to(tokens.dtype)
    start = len(encode(BEFORE_IMAGE))
    embeddings = torch.cat((embeddings[:, :start], tokens, embeddings[:, start + tokens.shape[1] :]), dim=1)
    text = model.model.language_model
    look = [layer for layer in (*LOOK_LAYERS, OPTION_LAYER) if layer < len(text.layers)]
    output = text_forward(text, embeddings, batch.layout, (PLACE_LAYER, BOX_LAYER), look, kernels)
    return model.lm_head(output.hidden[batch.labels != IGNORED]).float(), tokens, output


def look_losses(output: TextOutput, batch: Batch) -> dict[str, Tensor]:
    """Loss of looking elsewhere while answering.

    Minus the log of the attention paid to the right place; for counting, the divergence from an even spread over
    the objects and a token outside the image, whose share then tells their number.
    """
    start, cells = len(encode(BEFORE_IMAGE)), batch.shape.shape[1]
    losses = {}
    for layer in set(LOOK_LAYERS) & set(output.attention):
        groups = output.attention[layer]
        parts, question, token = [], 0, 0
        for (count, length), weights in zip(SLOTS, groups, strict=True):
            paid = weights[:, :, 0, :, start - 1 : start + cells].float()
            looked = batch.looked_at[:, question : question + count, None]
            spread = batch.counted[:, question : question + count, None]
            away = -torch.log((paid * looked).sum(-1) + 1e-3)
            uneven = (spread * (torch.log(spread + 1e-3) - torch.log(paid + 1e-3))).sum(-1)
            labels = batch.labels[:, token : token + count * length].unflatten(1, (count, length))
            chosen = labels != IGNORED
            loss = torch.where(spread.any(-1), uneven, away) * chosen
            # Mean over the answer's tokens first, so that a box counts as much as a word.
            parts.append((loss.sum(-1) / chosen.sum(-1).clamp(min=1))[chosen.any(-1)])
            question, token = question + count, token + count * length
        losses[f"look_{layer}"] = torch.cat(parts).mean()
    return losses


def option_losses(output: TextOutput, batch: Batch) -> dict[str, Tensor]:
    """Minus the log of the attention that a multiple-choice answer pays to the text of the right option."""
    if OPTION_LAYER not in output.attention:
        return {}
    (_, weights, _), group = output.attention[OPTION_LAYER], 1
    count, length = SLOTS[group]
    first = SLOTS[0][0] * SLOTS[0][1]
    place = slice(first, first + count * length)
    option = batch.option[:, place].unflatten(1, (count, length))
    paid = (weights[:, :, 1, :, batch.layout.prefix :].float() * option[:, :, None]).sum(-1)
    chosen = (batch.labels[:, place].unflatten(1, (count, length)) != IGNORED) & option.any(-1, keepdim=True)
    return {"option": -torch.log(paid[chosen] + 1e-3).mean()} if chosen.any() else {}


def all_losses(
    model: Any, heads: DenseHeads, batch: Batch, dense_weight: float, dtype: torch.dtype, kernels: Kernels = EAGER
) -> tuple[Tensor, dict[str, float]]:
    """Total training loss of one batch and its parts."""
    logits, tokens, output = answer_logits(model, batch, dtype, kernels)
    chosen = batch.labels != IGNORED
    weight = batch.weights[chosen]
    answers = (F.cross_entropy(logits, batch.labels[chosen], reduction="none") * weight).sum() / weight.sum()
    parts = {
        **vision_losses(heads, tokens, batch),
        **place_losses(heads, output.layers, batch),
        **look_losses(output, batch),
        **option_losses(output, batch),
    }
    total = answers + dense_weight * torch.stack(list(parts.values())).sum()
    return total, {"answers": answers.item(), **{name: value.item() for name, value in parts.items()}}


def vision_only_losses(
    model: Any, heads: DenseHeads, batch: Batch, dtype: torch.dtype, kernels: Kernels = EAGER
) -> tuple[Tensor, dict[str, float]]:
    """Loss of the warm-up in which only the vision tower is trained."""
    parts = vision_losses(heads, vision_forward(model.model.visual, batch.images, dtype, kernels), batch)
    return torch.stack(list(parts.values())).sum(), {name: value.item() for name, value in parts.items()}
