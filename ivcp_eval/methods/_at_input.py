"""What methods share that choose among an image's embeddings before the language model runs; of videos: `_clips`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractMethod, BudgetOf, Cut, Image, ModelFacts, Selection, Signals
from ivcp_eval.interface.ops import Part, itself, merged_selection, unit_range, unit_rows

Chosen = Tensor | tuple[Tensor, Tensor]
"""(K,) which of N tokens stay, in any order; or these and the weights (K, N) of what they become.

Row i of the weights stands at the place of token i of the first. Places are exchangeable where survivors are numbered
anew.
"""


@dataclass(frozen=True)
class ChoosingAtInput(AbstractMethod):
    """One cut at the model's input. Families that add visual features later are cut after these.

    Attributes:
        renumber: number the survivors 0..n-1; None as released, where the language model gets the shorter embeddings
            (not on M-RoPE, whose positions are places in the image), False is a variant.
    """

    released: ClassVar[Mapping[str, tuple[Any, ...]]] = {"renumber": (None, True)}
    budget_of: ClassVar[BudgetOf] = "image"

    renumber: bool | None = None

    @property
    def exact(self) -> bool:
        """Whether the budget decides how many stay, not a rule of the method's own."""
        return True

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One cut for every layer's cache."""
        return (Cut(model.first_cut, ratio, renumber=model.renumbers(self.renumber), budget=self.budget_of),)

    def selection(self, chosen: Sequence[Chosen], parts: Sequence[Part]) -> Selection:
        """Of what was chosen of each of the ``parts``, the row's images or clips."""
        if all(isinstance(one, Tensor) for one in chosen):
            kept = [part.tokens[one] for part, one in zip(parts, chosen, strict=True)]
            return Selection(torch.cat(kept).sort().values, exact=self.exact)
        pairs = [
            (one, itself(one, part.tokens.numel())) if isinstance(one, Tensor) else one
            for one, part in zip(chosen, parts, strict=True)
        ]
        keep, merge = merged_selection([kept for kept, _ in pairs], [weights for _, weights in pairs], parts)
        return Selection(keep, merge, exact=self.exact)


@dataclass(frozen=True)
class AtInput(ChoosingAtInput):
    """Image by image."""

    @abstractmethod
    def choose(self, signals: Signals, image: Image) -> Chosen:
        """Of the image's N tokens."""

    def select(self, signals: Signals) -> Selection:
        """What `choose` says of every image."""
        return self.selection([self.choose(signals, image) for image in signals.images], signals.images)


def embeddings(signals: Signals, part: Part) -> Tensor:
    """(N, E) the alive tokens of an image or clip as the language model gets them."""
    return signals.hidden[signals.visual[part.tokens]]


def importance(signals: Signals, image: Image, block: str = "") -> Tensor:
    """(N,) attention of the class token in a block of the vision tower; received attention where there is none."""
    prefix, vision = f"{block}/" if block else "", signals.vision
    return vision[prefix + ("cls" if f"{prefix}cls" in vision else "received")][image.tokens]


def relevance(signals: Signals, image: Image) -> Tensor:
    """(N,) cosine of each token's embedding to the mean embedding of the question, moved to 0..1 inside the image.

    What the language model itself offers in place of CLIP's text tower, as OpenVINO ships it.
    """
    question = unit_rows(signals.hidden[signals.question].float().mean(dim=0, keepdim=True))[0]
    return unit_range(unit_rows(embeddings(signals, image)) @ question)


def in_output_order(signals: Signals, kept: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``weights`` one after the other at the places of ``kept``, where survivors are numbered anew.

    Released code that does not sort hands the language model this order; where survivors keep their positions each
    stays at its own.
    """
    assert signals.cut is not None
    return (kept.sort().values if signals.cut.renumber else kept), weights


def grid_of(image: Image) -> tuple[int, int]:
    """(rows, columns) of the image's alive tokens; one row where they form no full grid (tiles, newlines)."""
    rows, columns = image.span.grid or (1, 0)
    n = image.tokens.numel()
    return (rows, columns) if rows * columns == n else (1, n)


def places(image: Image) -> Tensor:
    """(N, 2) where the tokens stand in an image of side 1."""
    rows, columns = grid_of(image)
    axes = (torch.linspace(0, 1, size, device=image.tokens.device) for size in (rows, columns))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


def equal_windows(image: Image, side: int) -> Tensor:
    """(N,) the window of each token, ``side`` of them along either side of the image."""
    rows, columns = grid_of(image)
    places = torch.arange(rows * columns, device=image.tokens.device)
    down, across = min(side, rows), min(side, columns)
    return places // columns * down // rows * across + places % columns * across // columns


def square_windows(image: Image, side: int) -> Tensor:
    """(N,) the window of each token, ``side`` by ``side`` tokens; what is left over belongs to the last ones."""
    rows, columns = grid_of(image)
    places = torch.arange(rows * columns, device=image.tokens.device)
    down, across = max(1, rows // side), max(1, columns // side)
    row, column = (places // columns // side).clamp_max(down - 1), (places % columns // side).clamp_max(across - 1)
    return row * across + column
