"""A selecting method with IVC-Prune's coordinate tokens forced into what it keeps.

Paper: https://arxiv.org/abs/2602.03060 (ablation: FastV + IVC, PyramidDrop + IVC).
Reference: https://github.com/FireRedTeam/IVC-Prune @ 03afd9c has no code for it.

In every image and at every cut the coordinate set of `ivc_prune` stays, and the method's own lowest-scored tokens
leave to hold the budget. A method that returns sets, not scores, is asked for fewer tokens, until together with the
coordinates they fill the budget; of one that picks greedily those are its first picks. What it merges stays merged.

Differs: the paper does not say how large the set is beside another method; here it is `ivc_prune`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import AbstractScorer, Cut, Faithfulness, Image, ModelFacts, Selection, Signals
from ivcp_eval.interface.method import method_name
from ivcp_eval.interface.ops import apportion, best_of_rest, coordinate_set, sparse_weights
from ivcp_eval.interface.registry import PLUS_IVC
from ivcp_eval.methods._wrapping import Wrapper


@dataclass(frozen=True)
class PlusIvc(Wrapper):
    """A selecting method and the implicit visual coordinates.

    Attributes:
        ivc: share of an image's tokens kept for each of the two coordinate scores.
        ivc_share: upper bound of each, as a share of the image's budget.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"
    suffix: ClassVar[str] = PLUS_IVC
    without: ClassVar[str] = "there are none to give up for the coordinates"

    ivc: float = 0.1
    ivc_share: float = 0.2

    def __post_init__(self) -> None:
        """Also refuse shares outside 0..1."""
        super().__post_init__()
        for name in ("ivc", "ivc_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside 0..1")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Those of the inner method.

        Raises:
            ValueError: it has none (`none`): the row would be the unpruned model under another name. Or it evicts.
        """
        cuts = self.inner.cuts(model, ratio)
        if not cuts or any(cut.evicts for cut in cuts):
            raise ValueError(self.refusal())
        return cuts

    def select(self, signals: Signals) -> Selection:
        """Coordinates first; the inner method's choice fills the budget.

        Raises:
            ValueError: the inner method's own rule sets how many tokens stay, so that none are to be given up.
        """
        if signals.budget == signals.n_visual:
            return self.inner.select(signals)
        forced = self._coordinates(signals)
        if isinstance(self.inner, AbstractScorer):
            score, keep = self.inner.score(signals), forced.clone()
            for image in signals.images:
                inside = forced[image.tokens]
                new = best_of_rest(score[image.tokens], inside, image.budget - int(inside.sum()))
                keep[image.tokens[new]] = True
            return Selection(keep.nonzero().flatten())
        return self._fill(signals, forced)

    def _coordinates(self, signals: Signals) -> Tensor:
        """(V,) bool, never more than an image's budget."""
        forced = torch.zeros(signals.n_visual, dtype=torch.bool, device=signals.visual.device)
        cos, sin = (part.mean(dim=(0, 2))[signals.visual] for part in signals.rope())
        for image in signals.images:
            inside = coordinate_set(cos[image.tokens], sin[image.tokens], image, self.ivc, self.ivc_share)
            forced[image.tokens[inside][: image.budget]] = True
        return forced

    def _fill(self, signals: Signals, forced: Tensor) -> Selection:
        """By bisection, for all images or clips at once: the most own tokens that leave room for the coordinates."""
        parts = _budgeted(signals)
        tokens = [torch.cat([image.tokens for image in part]) for part in parts]
        budgets = [sum(image.budget for image in part) for part in parts]
        low = [b - int(forced[own].sum()) for b, own in zip(budgets, tokens, strict=True)]
        high = list(budgets)
        while low != high:
            middle = [-(-(a + b) // 2) for a, b in zip(low, high, strict=True)]
            _, kept = self._choose(signals, middle)
            for i, own in enumerate(tokens):
                if low[i] == high[i]:
                    continue
                if int((kept | forced)[own].sum()) <= budgets[i]:
                    low[i] = middle[i]
                else:
                    high[i] = middle[i] - 1
        more = self._choose(signals, [min(a + 1, b) for a, b in zip(low, budgets, strict=True)])[1]
        chosen, kept = self._choose(signals, low, signals.memory)
        keep = kept | forced
        for own, budget in zip(tokens, budgets, strict=True):
            # A larger choice need not hold the smaller one, and may bring two new tokens where there is room for one.
            new = own[(more & ~keep)[own]]
            keep[new[: budget - int(keep[own].sum())]] = True
        return Selection(keep.nonzero().flatten(), None if chosen.merge is None else _merged(chosen, kept, keep))

    def _choose(
        self, signals: Signals, budgets: Sequence[int], memory: dict[str, Any] | None = None
    ) -> tuple[Selection, Tensor]:
        """The inner method's choice of so many tokens of each image or clip, and (V,) bool of it; 0 leaves it out.

        Every call is as the first: draws begin anew, and what the method remembers is kept in ``memory`` only.
        """
        parts, images = _budgeted(signals), list[Image]()
        for part, total in zip(parts, budgets, strict=True):
            sizes, alive = [image.n_prompt for image in part], [image.tokens.numel() for image in part]
            split = apportion(max(1, total), sizes, alive)
            images += [replace(image, budget=b) for image, b in zip(part, split, strict=True)]
        drawn = None if signals.generator is None else signals.generator.clone_state()
        memory = dict(signals.memory) if memory is None else memory
        chosen = self.inner.select(replace(signals, images=tuple(images), generator=drawn, memory=memory))
        if not chosen.exact:
            raise ValueError(
                f"{method_name(self.inner)!r} sets how many tokens stay by a rule of its own here, so it gives none up "
                f"for the coordinates; choose parameters with which it keeps to the retention ratio"
            )
        kept = torch.zeros(signals.n_visual, dtype=torch.bool, device=signals.visual.device)
        kept[chosen.keep] = True
        for part, total in zip(parts, budgets, strict=True):
            for image in part if not total else ():
                kept[image.tokens] = False
        return chosen, kept


def _budgeted(signals: Signals) -> tuple[tuple[Image, ...], ...]:
    """What holds a budget of its own at this cut: each image, or the images of each clip."""
    if signals.cut is not None and signals.cut.budget == "clip":
        return signals.clips
    return tuple((image,) for image in signals.images)


def _merged(chosen: Selection, kept: Tensor, keep: Tensor) -> Tensor:
    """(K, V) sparse merge weights for ``keep``: the method's own where it kept a token, else the token itself."""
    assert chosen.merge is not None
    merge = chosen.merge.to_sparse().coalesce()
    row, column = merge.indices()
    stays = kept[chosen.keep[row]]
    alone = (keep & ~kept).nonzero().flatten()
    token = torch.cat((chosen.keep[row[stays]], alone))
    column = torch.cat((column[stays], alone))
    value = torch.cat((merge.values()[stays], torch.ones_like(alone, dtype=merge.dtype)))
    places = keep.nonzero().flatten()
    return sparse_weights(torch.searchsorted(places, token), column, value, (places.numel(), keep.numel()))
