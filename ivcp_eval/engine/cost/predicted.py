"""What a method's cuts cost, before any model runs, and the retention ratio that makes methods cost the same.

Papers count differently: FastV's "50 %" processes 53.6 % of the visual tokens on average over layers, PyramidDrop's
(per stage) 46.9 %, IVC-Prune's 78.6 % while caching 50 %. Here every method has the same numbers, all shares of the
unpruned model: visual tokens after the last cut, visual tokens processed in the prefill and cached (means over layers),
and decoder FLOPs of the prefill (`ivcp_eval.engine.cost.flops`). The CSV carries what was measured; this module
predicts it, up to rounding, and finds the ratio at which a method costs a given share (`solve_budget`, `ratio_for`),
for ``ivcp eval --budget`` and the ``budget:`` of a sweep file.

Predictions are made from the cuts that a method declares. A method whose own rule overrides its budget (SparseVLM's
counts by rank, IVC-Prune's released presets) is not held by them: believe what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ivcp_eval.engine.cost.flops import DecoderShape, sparse_flops
from ivcp_eval.engine.guards.cuts import check_cuts
from ivcp_eval.interface import AbstractMethod, Cut, ModelFacts
from ivcp_eval.interface.registry import adapter, family_of, make_method
from ivcp_eval.interface.variants import KINDS, OWN, PROMPT, BudgetKind, CostTarget, Variant

if TYPE_CHECKING:
    from ivcp_eval.interface.models import Weights


@dataclass(frozen=True)
class Prompt:
    """The prompt that FLOPs are counted for: visual and text tokens of one row, and the decoder's shape."""

    shape: DecoderShape
    n_visual: int
    n_text: int


@dataclass(frozen=True)
class Cost:
    """Shares of the unpruned model, in 0..1.

    Attributes:
        final: visual tokens after the last cut.
        layer_mean: visual tokens processed in the prefill, mean over layers.
        cached: visual tokens in the KV cache, mean over layers.
        cached_bytes: bytes of the visual part of the KV cache. Below ``cached`` only for methods that compress
            channels, and then analytic: their saving is not realised here.
        flops: decoder FLOPs of the prefill, or None where no prompt was given. Analytic, of a real implementation, for
            methods that leave out pairs of tokens or MLPs: their saving is not realised here.
    """

    final: float
    layer_mean: float
    cached: float
    cached_bytes: float
    flops: float | None


def processed(cuts: Sequence[Cut], n_layers: int) -> list[float]:
    """Share of the prompt's visual tokens that each decoder layer processes in the prefill.

    Raises:
        ValueError: a cut at a layer that the decoder does not have.
    """
    shares = [1.0] * n_layers
    for cut in cuts:
        if cut.layer >= n_layers:
            raise ValueError(f"layer {cut.layer} is outside 0..{n_layers - 1}, the decoder layers of this model")
        if cut.evicts:
            continue
        shares[cut.layer :] = [min(cut.ratio, shares[cut.layer])] * (n_layers - cut.layer)
    return shares


def cached(cuts: Sequence[Cut], n_layers: int) -> list[float]:
    """Share of the prompt's visual tokens in the KV cache of each decoder layer after the prefill."""
    shares = processed(cuts, n_layers)
    for cut in (cut for cut in cuts if cut.cache != "from_cut"):
        first, behind = (cut.layer, cut.layer + 1) if cut.evicts else (int(cut.cache == "all_but_first"), cut.layer)
        for layer in range(first, behind):
            shares[layer] = min(shares[layer], cut.ratio)
    return shares


def cost(method: AbstractMethod, facts: ModelFacts, ratio: float, prompt: Prompt | None = None) -> Cost:
    """What ``method`` costs at a retention ratio in (0, 1], without rounding."""
    shrunk = method.pixel_share(ratio) if ratio < 1 else None
    cuts = method.cuts(facts, ratio) if ratio < 1 else ()
    scale = 1.0 if shrunk is None else shrunk
    layers = [scale * share for share in processed(cuts, facts.n_layers)]
    slots = [scale * share for share in cached(cuts, facts.n_layers)]
    key_share = method.key_share(ratio) if ratio < 1 else 1.0
    mean_slots = sum(slots) / len(slots)
    return Cost(
        final=layers[-1],
        layer_mean=sum(layers) / len(layers),
        cached=mean_slots,
        cached_bytes=mean_slots * (1 + key_share) / 2,
        flops=None if prompt is None else _flops(method, facts, ratio, layers, prompt),
    )


def _flops(method: AbstractMethod, facts: ModelFacts, ratio: float, layers: Sequence[float], prompt: Prompt) -> float:
    shape, text = prompt.shape, prompt.n_text
    whole = shape.prefill_flops([prompt.n_visual + text] * len(layers))
    sparse = method.sparse_shares(facts, ratio, prompt.n_visual) if ratio < 1 else ()
    if not sparse:
        return shape.prefill_flops([share * prompt.n_visual + text for share in layers]) / whole
    counts, pairs, mlp = [], [], []
    for share, (seen, processed) in zip(layers, sparse, strict=True):
        n = share * prompt.n_visual
        counts.append(n)
        pairs.append(seen * n * (n + 1) / 2)
        mlp.append(processed * n)
    return sparse_flops(shape, text, counts, pairs, mlp) / whole


def solve_ratio(
    method: AbstractMethod, facts: ModelFacts, target: float, kind: BudgetKind, prompt: Prompt | None = None
) -> float:
    """The retention ratio at which a method costs ``target`` of the unpruned model, by bisection.

    Args:
        kind: which of its costs. "flops" needs a ``prompt``.

    Returns:
        A ratio in (0, 1], whose cost before rounding to whole tokens is the target.

    Raises:
        ValueError: unknown kind, target outside (0, 1], no prompt for FLOPs, a cost that does not follow the ratio,
            or a target below what the method costs with hardly any token left (its first cut comes too late).
    """
    if kind not in KINDS:
        raise ValueError(f"budget kind {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if not 0 < target <= 1:
        raise ValueError(f"target {target!r} is outside (0, 1]: it is a share of the unpruned model's cost")
    if kind == "flops" and prompt is None:
        raise ValueError(
            "equal FLOPs need the prompt they are counted for; pass prompt=Prompt(shape, n_visual, n_text)"
        )

    def at(ratio: float) -> float:
        value = getattr(cost(method, facts, ratio, prompt), kind)
        assert isinstance(value, float)
        return value

    if target == 1:
        return 1.0
    smallest = 1e-6
    lowest, cuts = at(smallest), method.cuts(facts, smallest)
    if lowest >= 1:
        others = [other for other in KINDS if other != kind and _follows(method, facts, smallest, other, prompt)]
        raise ValueError(
            f"this method's {kind} cost does not follow its retention ratio (with these parameters), so none gives "
            f"{target:g}; use budget {' or '.join([*others, OWN])} ({OWN}: its own ratio)"
        )
    if target < lowest:
        raise ValueError(
            f"this method costs at least {lowest:.3g} of the unpruned model ({kind}) on {facts.n_layers} layers, "
            f"however few tokens it keeps; {target:g} needs {'an earlier cut' if cuts else 'other parameters'}"
        )
    return _bisect(at, target, smallest)


def _follows(method: AbstractMethod, facts: ModelFacts, ratio: float, kind: BudgetKind, prompt: Prompt | None) -> bool:
    value = getattr(cost(method, facts, ratio, prompt), kind)
    return value is not None and bool(value < 1)


def _bisect(at: Callable[[float], float], target: float, low: float) -> float:
    high = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if at(middle) < target:
            low = middle
        else:
            high = middle
    return high


# -- variants of a model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """What budgets need to know of one checkpoint."""

    facts: ModelFacts
    shape: DecoderShape

    @classmethod
    def of(cls, weights: Weights) -> Decoder:
        """From its configuration alone; no weights are read."""
        wired = adapter(weights.family)
        config = wired.config(str(weights.source))
        return cls(wired.facts(config, weights.family), DecoderShape.of(config))


def solve_budget(variant: Variant, decoder: Decoder) -> Variant:
    """The variant with the ratio that holds its budget, for its tuned parameters; unchanged without a budget.

    Where no ratio does, the variant keeps its target as its ratio and its budget says why (``problem``): it cannot be
    run, and its cell becomes a row with that reason.
    """
    budget = variant.budget
    if budget is None:
        return variant
    method = make_method(variant.method, variant.parameters)
    prompt = None if budget.prompt is None else Prompt(decoder.shape, *budget.prompt)
    try:
        ratio = solve_ratio(method, decoder.facts, budget.target, budget.kind, prompt)
    except ValueError as error:  # also the method's own, for a model with too few layers
        return replace(variant, ratio=budget.target, budget=replace(budget, problem=f"{budget.label}: {error}"))
    return replace(variant, ratio=round(ratio, 12), budget=replace(budget, problem=""))


def misfit(variant: Variant, facts: ModelFacts) -> str:
    """Why a model of these facts cannot run the variant: no ratio holds its budget, or it lacks a layer; or nothing."""
    if variant.server is not None:
        return ""
    if variant.budget is not None and variant.budget.problem:
        return variant.budget.problem
    try:
        cuts = make_method(variant.method, variant.parameters).cuts(facts, variant.ratio)
        check_cuts(tuple(cuts), facts, variant.method)
    except ValueError as error:
        return str(error)
    return ""


def ratio_for(
    model: Any,
    method: str,
    target: float,
    budget: str,
    *,
    prompt: tuple[int, int] = PROMPT,
    family: str | None = None,
    **parameters: Any,
) -> float:
    """The ratio for `ivcp_eval.prune` at which ``method`` costs ``target`` of the unpruned ``model``.

    Args:
        model: as in `prune`, also without weights. budget: "final", "layer_mean" or "flops".
        prompt: (visual, text) tokens for which FLOPs are counted; the other budgets do not need it.
        family: adapter name; found from the model if not given. **parameters: of the method.

    Raises:
        ValueError: an unknown name, or no ratio that costs so much (`solve_ratio`).
    """
    family = family or family_of(model.config.model_type)
    decoder = Decoder(adapter(family).facts(model.config, family), DecoderShape.of(model.config))
    held = solve_budget(Variant("", method, target, parameters, budget=CostTarget.of(budget, target, prompt)), decoder)
    if held.budget is not None and held.budget.problem:
        raise ValueError(held.budget.problem)
    return held.ratio


def described(variant: Variant) -> str:
    """One line about a variant with a budget: the ratio that holds it."""
    budget = variant.budget
    assert budget is not None
    method = make_method(variant.method, variant.parameters)
    counted = budget.kind == "flops" and "sparse" in method.needs
    return (
        f"{variant.name} runs at retention ratio {variant.ratio:.4f}, which costs {budget.target:g} of {budget.label}"
        + (" in a real implementation (ratio_flops_analytic); here nothing is saved" if counted else "")
    )
