"""Which ratios and cuts a decoder can be run with: known from its configuration, before any weights are read."""

from __future__ import annotations

import math

from ivcp_eval.interface import Cut, ModelFacts


def check_ratio(ratio: float) -> None:
    """Raise ValueError unless ``ratio`` is a number in (0, 1]."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or math.isnan(ratio) or not 0 < ratio <= 1:
        raise ValueError(f"retention ratio {ratio!r} is outside (0, 1]: 0.5 keeps half of the visual tokens, 1 all")


def check_cuts(cuts: tuple[Cut, ...], facts: ModelFacts, method: str) -> None:
    """Raise ValueError unless a model of these facts can make the cuts; the message says which layers it has."""
    layers = [cut.layer for cut in cuts]
    if not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"method {method!r} cuts at layers {layers}; a layer is a whole number")
    if layers != sorted(set(layers)):
        raise ValueError(f"method {method!r} cuts at layers {layers}; they must increase strictly")
    if len({cut.evicts for cut in cuts if cut.ratio < 1}) > 1:
        raise ValueError(
            f"method {method!r} cuts the sequence and evicts from single caches; a method does one or the other"
        )
    for cut in cuts:
        check_ratio(cut.ratio)
        if cut.late and not cut.evicts:
            raise ValueError(
                f'method {method!r} cuts layer {cut.layer} late, which only an eviction (cache="own") can be'
            )
        lowest = facts.first_cut if cut.ratio < 1 and not cut.evicts else 0
        if not lowest <= cut.layer < facts.n_layers:
            raise ValueError(
                f"layer {cut.layer} of method {method!r} is outside {lowest}..{facts.n_layers - 1}, "
                f"the decoder layers of this {facts.family} model that can be cut"
            )
