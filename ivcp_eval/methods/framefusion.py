"""Merges tokens that stay alike from frame to frame, layer after layer, then keeps what the last token attends to.

Paper: https://arxiv.org/abs/2501.01986 (FrameFusion: similarity merging, then importance pruning).
Reference: https://github.com/thu-nics/FrameFusion @ fbec1d2 (framefusion/main.py)

Tokens at the same place of the frames form a chain. A token with a cosine of ``similarity_lower_bound`` and more to its
predecessor in the chain is merged into the last one before it that has not, which becomes the mean of itself and of the
run that joined it, and keeps its place. This is done again in the next layer, as long as ``ratio_lower_bound`` of the
tokens and more were merged; then those that the last token attends to most, mean over heads, are kept once. If merging
alone reaches the budget, the most alike are merged until it is, and nothing is pruned. The caches of the layers before
keep what they hold.

A picture has no predecessors: it is pruned in the second layer.

Differs: merging and pruning stand before a layer; the released code does them between its attention and its MLP, and
once before the first. At most ``steps`` layers merge, and the next one prunes at the latest. Released is a cost,
the mean over 28 layers of what is left, from which the share of each step follows (``counts="released"``); here the
budget is what is left in the end, exactly, of every video by itself. How much of the layers before is saved is known
only then, so costs that are predicted count the budget from the first layer on; those measured are right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ivcp_eval.interface import Cut, Faithfulness, ModelFacts, Selection, Signal, Signals, Unsupported
from ivcp_eval.interface.ops import group_means, last_token, mean_attention, top
from ivcp_eval.methods._at_input import Chosen, embeddings
from ivcp_eval.methods._clips import Clip, CountedClips, clips_of, cosines

LAYERS = 28  # of the released formula, whatever the model
_STATE = "framefusion"


class Progress(NamedTuple):
    """Of one video: what share of it each layer merged, and whether merging and pruning are done."""

    merged: tuple[float, ...] = ()
    all_merged: bool = False
    pruned: bool = False


@dataclass(frozen=True)
class Method(CountedClips):
    """FrameFusion at the borders of layers.

    Attributes:
        similarity_lower_bound: cosine from which on a token is merged into its predecessor.
        ratio_lower_bound: share of the tokens below which a layer's merging is the last.
        steps: layers that merge, at most.
    """

    needs: ClassVar[frozenset[Signal]] = frozenset({"query", "key"})
    faithfulness: ClassVar[Faithfulness] = "variant"

    renumber: bool | None = False
    similarity_lower_bound: float = 0.6
    ratio_lower_bound: float = 0.1
    steps: int = 3

    def __post_init__(self) -> None:
        """Refuse values that no run can mean."""
        super().__post_init__()
        if not -1 <= self.similarity_lower_bound <= 1 or not 0 <= self.ratio_lower_bound <= 1 or self.steps < 1:
            raise ValueError(
                f"similarity_lower_bound={self.similarity_lower_bound} must lie in -1..1, "
                f"ratio_lower_bound={self.ratio_lower_bound} in 0..1, steps={self.steps} be 1 or more"
            )

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """One before each of the layers that merge, fewer in a shallow model, and one before the next.

        Raises:
            Unsupported: there is no layer to prune at.
        """
        last = min(model.first_cut + self.steps, model.n_layers - 1)
        if last <= model.first_cut:
            raise Unsupported(f"framefusion cuts at two layers or more, but the model has {model.n_layers}")
        layers = range(model.first_cut, last + 1)
        renumber = model.renumbers(self.renumber)
        return tuple(Cut(n, ratio, cache="from_cut", renumber=renumber, budget="clip") for n in layers)

    def select(self, signals: Signals) -> Selection:
        """Merging or pruning of each video, or nothing where both are done."""
        clips, before = clips_of(signals), signals.memory.get(_STATE)
        progress = before or (Progress(),) * len(clips)
        chosen, after = zip(*map(self.step, [signals] * len(clips), clips, progress), strict=True)
        signals.memory[_STATE] = after
        selection = self.selection(chosen, clips)
        held = selection.keep.numel() == signals.budget
        return Selection(selection.keep, selection.merge, exact=self.exact and held)

    def choose(self, signals: Signals, clip: Clip) -> Chosen:
        """The first step of a video."""
        return self.step(signals, clip, Progress())[0]

    def step(self, signals: Signals, clip: Clip, now: Progress) -> tuple[Chosen, Progress]:
        """What one layer leaves of a video."""
        assert signals.cut is not None
        n = len(clip.tokens)
        every = torch.arange(n, device=clip.tokens.device)
        if now.pruned:
            return every, now
        share = 1 - clip.budget / n if self.exact else to_remove(now.merged, signals.cut.ratio)
        if now.all_merged or signals.stage == self.steps:
            count = clip.budget if self.exact else round(n * (1 - share))
            attention = mean_attention(signals, last_token(signals))[clip.tokens]
            return top(attention, count), now._replace(all_merged=True, pruned=True)
        most = n - clip.budget if self.exact else int(share * n)
        place = places_in_prompt(signals, clip)
        return self.merged(embeddings(signals, clip), place, share, most, now)

    def merged(
        self, states: Tensor, place: Tensor, share: float, most: int, now: Progress
    ) -> tuple[tuple[Tensor, Tensor], Progress]:
        """The tokens (K,) that go on and the sparse weights (K, N) of what they become, of ``states`` (N, E).

        Args:
            place: (N,) of the frame. share: of the tokens that is to go, ``most`` in number. now: before this layer.
        """
        order, before = chains(place)
        alike = cosines(states, before)
        joins = alike >= self.similarity_lower_bound
        found = int(joins.sum())
        if found / len(states) < share:
            done = found / len(states) < self.ratio_lower_bound
            now = now._replace(merged=(*now.merged, found / len(states)), all_merged=done)
        else:
            joins = torch.zeros_like(joins)
            joins[top(alike, most)] = True
            now = now._replace(all_merged=True, pruned=True)
        kept = (~joins).nonzero().flatten()
        at = torch.arange(len(order), device=order.device)
        last = torch.where(joins[order], 0, at).cummax(dim=0).values  # chains begin with one that joins nothing
        head = torch.empty_like(order)
        head[order] = order[last]
        return (kept, group_means(torch.searchsorted(kept, head), len(kept))), now


def to_remove(merged: tuple[float, ...], cost: float) -> float:
    """The share of the tokens at hand whose removal now makes the mean over all layers the ``cost``."""
    left, passed = 1.0, 0.0
    for share in merged:
        left *= 1 - share
        passed += left
    need = (LAYERS * cost - passed) / ((LAYERS - len(merged)) * left)
    return 0.0 if need > 1 else 1 - need


def chains(place: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) the tokens chain after chain, those of one ``place`` (N,) being one; and each one's predecessor, or -1."""
    order = place.sort(stable=True).indices
    before = torch.full_like(order, -1)
    same = place[order[1:]] == place[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    return order, before


def places_in_prompt(signals: Signals, clip: Clip) -> Tensor:
    """(N,) which of its frame's tokens in the prompt each alive one is."""
    assert signals.columns is not None
    columns = signals.columns
    found = [torch.searchsorted(image.span.columns, columns[image.tokens.cpu()]) for image in clip.frames]
    return torch.cat(found).to(clip.tokens.device)
