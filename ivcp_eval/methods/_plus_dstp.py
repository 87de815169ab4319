"""A selecting method whose dropped tokens stay in reserve: decoding swaps them in where its attention has shifted.

Paper: https://arxiv.org/abs/2604.12358 (decoding-stage shift-aware token pruning: threshold 0.75, 20 steps).
Reference: none; code was announced, not found.

Decoding attends to the tokens that the method keeps. In every step the attention of the newest token to them is
compared with that of the prompt's last token. Where the cosine falls below ``tau``, the k best of all tokens, k being
as many as the method keeps, are attended to beside its own for ``hold`` steps; then its own are back, and compared at
once. Attention to kept and to reserved tokens is a softmax each, ranked side by side without a common norm.

Differs: what is public leaves open which layers compare and what states reserved tokens have. Here one layer compares
(``watch``), by the mean of its heads, over visual tokens alone; layers before it follow one step later. Reserved tokens
need keys and values in every layer, so the prefill runs whole, the first token of an answer is the unpruned model's,
and nothing is merged: the method chooses as it would, each cut among what it left before, but attention rows still hold
the others. Nothing is freed either: what decoding attends to is measured and reported as analytic.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Cut, Faithfulness, Image, ModelFacts, Selection, Signal, Signals, Step
from ivcp_eval.interface.ops import budgets, last_token, top
from ivcp_eval.interface.registry import PLUS_DSTP
from ivcp_eval.methods._wrapping import Wrapper

_STATE = "dstp"


@dataclass(frozen=True)
class Reserve(Cut):
    """An observation in place of a cut.

    Attributes:
        inner: the cut that the method would make, its number ``stage``; None where there is none.
        watched: whether the layer before compares attention while decoding.
    """

    inner: Cut | None = None
    stage: int = 0
    watched: bool = False


@dataclass
class _State:
    """What is remembered of one row.

    Attributes:
        kept: (N,) bool of the prompt's visual tokens, the method's own. now: those attended to.
        anchor: (H, N) attention of the prompt's last token in the layer before ``watch``, adding up to 1.
        until: step in which the method's own set is back; 0 before any swap.
        inner: what the method remembers.
    """

    kept: Tensor
    now: Tensor
    anchor: Tensor | None = None
    watch: int = -1
    until: int = 0
    inner: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlusDstp(Wrapper):
    """A selecting method that may look back while decoding.

    Attributes:
        tau: cosine below which attention counts as shifted.
        hold: steps for which other tokens stay swapped in.
        watch: where in the decoder attention is compared, as a share of its depth.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"
    suffix: ClassVar[str] = PLUS_DSTP
    without: ClassVar[str] = "it leaves none in reserve"

    tau: float = 0.75
    hold: int = 20
    watch: float = 0.5

    if not TYPE_CHECKING:  # a class variable of the base

        @property
        def needs(self) -> frozenset[Signal]:
            """What the inner method needs, and every step."""
            return self.inner.needs | {"step"}

    def __post_init__(self) -> None:
        """Also refuse numbers that no run can mean."""
        super().__post_init__()
        if not -1 <= self.tau <= 1 or self.hold < 1 or not 0 <= self.watch <= 1:
            raise ValueError(f"tau={self.tau} must be a cosine, hold={self.hold} 1 or more, watch={self.watch} in 0..1")

    def cuts(self, model: ModelFacts, ratio: float) -> tuple[Cut, ...]:
        """Observations where the inner method cuts, and one behind the layer that compares.

        Raises:
            ValueError: the inner method never cuts the sequence.
        """
        cuts = self.inner.cuts(model, ratio)
        if not any(cut.ratio < 1 for cut in cuts) or any(cut.evicts for cut in cuts):
            raise ValueError(self.refusal())
        made = {cut.layer: Reserve(cut.layer, 1.0, needs=cut.needs, inner=cut, stage=i) for i, cut in enumerate(cuts)}
        watch = max(1, min(round(self.watch * model.n_layers), model.n_layers - 1))
        here = made.get(watch, Reserve(watch, 1.0))
        made[watch] = replace(here, watched=True, needs=here.needs | {"query", "key"})
        return tuple(made[layer] for layer in sorted(made))

    def select(self, signals: Signals) -> Selection:
        """Everything; what the inner method would keep is remembered."""
        cut = signals.cut
        assert isinstance(cut, Reserve)
        everything = torch.ones(signals.n_visual, dtype=torch.bool)
        state: _State = signals.memory.setdefault(_STATE, _State(everything, everything))
        if cut.inner is not None:
            state.kept = state.now = self._chosen(signals, cut.inner, cut.stage, state)
        if cut.watched:
            attention = signals.attention(last_token(signals))[:, 0, signals.visual]
            state.watch, state.anchor = cut.layer, torch.nn.functional.normalize(attention, p=1, dim=1)
        return Selection(everything.nonzero().flatten())

    def _chosen(self, signals: Signals, cut: Cut, stage: int, state: _State) -> Tensor:
        """(N,) bool: what the inner method keeps of what it kept before."""
        left = state.kept.nonzero().flatten().to(signals.visual.device)
        shown = replace(
            signals,
            images=_left_of(signals, left, cut),
            visual=signals.visual[left],
            vision={name: signal[left] for name, signal in signals.vision.items()},
            cut=cut,
            stage=stage,
            memory=state.inner,
        )
        selection = self.inner.select(shown)
        selection.check(shown, self.name)
        kept = torch.zeros_like(state.kept)
        kept[left[selection.keep].cpu()] = True
        return kept if cut.ratio < 1 else state.kept

    def attended(self, step: Step) -> Tensor | None:
        """The set in force."""
        state: _State = step.memory[_STATE]
        if step.layer == state.watch:
            self._compare(step, state)
        return state.now[step.token]

    def _compare(self, step: Step, state: _State) -> None:
        if step.number < state.until:
            return
        state.now = state.kept
        if bool(state.kept.all()):
            return
        assert state.anchor is not None
        logits = step.logits()
        kept = state.kept.to(logits.device)
        current = logits[:, kept].softmax(dim=1).mean(dim=0)
        before = torch.nn.functional.normalize(state.anchor[:, kept], p=1, dim=1).mean(dim=0)
        if float(torch.nn.functional.cosine_similarity(before, current, dim=0)) >= self.tau:
            return
        score = torch.empty_like(logits[0])
        score[kept] = current
        score[~kept] = logits[:, ~kept].softmax(dim=1).mean(dim=0)
        state.now = state.kept.clone()
        state.now[top(score, int(kept.sum())).cpu()] = True
        state.until = step.number + self.hold


def _left_of(signals: Signals, left: Tensor, cut: Cut) -> tuple[Image, ...]:
    """The images with the tokens that are ``left`` (M,) of the row's, counted among these, and budgets for ``cut``."""
    stays = [torch.isin(image.tokens, left) for image in signals.images]
    clips = [number for number, clip in enumerate(signals.clips) for _ in clip]
    groups = clips if cut.budget == "clip" else range(len(stays))
    sizes = [image.n_prompt for image in signals.images]
    allowances = budgets(cut.ratio, sizes, [int(here.sum()) for here in stays], groups)
    return tuple(
        replace(
            image,
            tokens=torch.searchsorted(left, image.tokens[here]),
            view=None if image.view is None else image.view[here],
            budget=allowed,
        )
        for image, here, allowed in zip(signals.images, stays, allowances, strict=True)
    )
