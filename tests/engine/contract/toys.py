"""Methods that exist to exercise the engine: every cache policy, several cuts, merging, re-numbering, randomness."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ivcp_eval.interface import (
    AbstractScorer,
    BudgetOf,
    CachePolicy,
    Cut,
    Image,
    ModelFacts,
    Selection,
    Signals,
    ops,
)


@dataclass(frozen=True)
class Toy(AbstractScorer):
    """Scores that depend on a token's place only, so that no rounding error can change the choice.

    Attributes:
        depths: where to cut, as shares of the depth.
        policies: of the cuts, in order; the last one repeats.
        renumber: likewise.
        merge: survivors become weighted means over all visual tokens.
        draw: scores from the row's generator instead.
        budget: what it holds for; frames of a clip may share one.
    """

    depths: tuple[float, ...] = (0.5,)
    policies: tuple[CachePolicy, ...] = ("all_layers",)
    renumber: tuple[bool, ...] = (False,)
    merge: bool = False
    draw: bool = False
    budget: BudgetOf = "image"

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Ratios fall evenly to ``ratio``."""
        cuts = []
        for i, depth in enumerate(self.depths):
            last = i == len(self.depths) - 1
            cuts.append(
                Cut(
                    layer=max(model.first_cut + i, int(depth * model.n_layers)),
                    ratio=ratio if last else 1 - (1 - ratio) * (i + 1) / len(self.depths),
                    cache=self.policies[min(i, len(self.policies) - 1)],
                    renumber=self.renumber[min(i, len(self.renumber) - 1)],
                    budget=self.budget,
                )
            )
        return tuple(cuts)

    def score(self, signals: Signals) -> Tensor:
        """A fixed pattern along each image, or noise; `memory` must hold what the stage before left."""
        assert signals.memory.get("stages", 0) == signals.stage, "memory was not kept from cut to cut"
        signals.memory["stages"] = signals.stage + 1
        if self.draw:
            return torch.rand(signals.n_visual, generator=signals.generator).to(signals.visual.device)
        score = torch.zeros(signals.n_visual)
        for i, image in enumerate(signals.images):
            place = torch.arange(image.tokens.numel(), dtype=torch.float64)
            score[image.tokens.cpu()] = torch.sin(12.9898 * (place + 1) + i + signals.stage).float()
        return score.to(signals.visual.device)

    def select(self, signals: Signals) -> Selection:
        """The best of each image or clip, merged with all others if asked."""
        keep = super().select(signals).keep
        if self.budget == "clip":
            signals.memory["stages"] = signals.stage  # scored once more
            keep = ops.top_of_each_image(self.score(signals), [_joined(clip) for clip in signals.clips])
        if not self.merge:
            return Selection(keep)
        distance = (keep[:, None] - torch.arange(signals.n_visual, device=keep.device)).abs().float()
        return Selection(keep, merge=(-distance).softmax(dim=-1))


def _joined(clip: tuple[Image, ...]) -> Image:
    """A clip as if it were one image."""
    tokens = torch.cat([image.tokens for image in clip])
    return replace(clip[0], tokens=tokens, budget=sum(image.budget for image in clip))


TOYS = {
    "toy_all_layers": Toy(),
    "toy_from_cut": Toy(policies=("from_cut",)),
    "toy_all_but_first": Toy(policies=("all_but_first",)),
    "toy_at_input": Toy(depths=(0.0,)),
    "toy_at_input_and_later": Toy(depths=(0.0, 0.5), policies=("from_cut",)),
    "toy_last_layer": Toy(depths=(0.99,)),
    "toy_stages_from_cut": Toy(depths=(0.2, 0.5, 0.8), policies=("from_cut",)),
    "toy_stages_all_layers": Toy(depths=(0.2, 0.5, 0.8)),
    "toy_stages_mixed": Toy(depths=(0.2, 0.5, 0.8), policies=("from_cut", "all_but_first", "all_layers")),
    "toy_merge": Toy(depths=(0.2, 0.7), merge=True),
    "toy_renumber": Toy(renumber=(True,)),
    "toy_renumber_from_cut": Toy(policies=("from_cut",), renumber=(True,)),
    "toy_renumber_twice": Toy(depths=(0.2, 0.5, 0.8), policies=("from_cut",), renumber=(True,)),
    "toy_renumber_once": Toy(depths=(0.2, 0.7), policies=("from_cut", "all_layers"), renumber=(True, False)),
    "toy_draw": Toy(draw=True),
    "toy_clips": Toy(depths=(0.2, 0.5, 0.8), policies=("from_cut", "all_but_first", "all_layers"), budget="clip"),
}
