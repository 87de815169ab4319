"""The pre-training of the vision tower on *what* alone.

It stands in for CLIP: linear heads read shape, colour, texture and digits off each visual token.
No head asks where something is, so the tower is taught no coordinates; afterwards it is frozen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivcp_eval.lab.tiny.scenes import COLOURS, SHAPES, SIGN
from ivcp_eval.lab.tiny2.scenes import TEXTURES, Scene, cell_owner

IGNORED = -100
SHAPE_CLASSES = ("background", *SHAPES, SIGN)
COLOUR_CLASSES = ("background", *COLOURS, "white")


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
