"""One way of running a model: method, ratio and parameters, and the names VLMEvalKit sees. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE = "none"
SEPARATOR = "__"


@dataclass(frozen=True)
class Variant:
    """A pruned (or, with method ``none``, unpruned) way of running one model.

    Attributes:
        model: short name. method: registered name. ratio: retention ratio in (0, 1].
        parameters: of the method, as the user gave them. seed: of methods that draw.
    """

    model: str
    method: str = BASELINE
    ratio: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def name(self) -> str:
        """``tiny__ivc_prune__r0.5``, the name in VLMEvalKit; parameters do not show, so hashes tell cells apart."""
        if self.method == BASELINE:
            return self.model
        return SEPARATOR.join((self.model, self.method, f"r{self.ratio:g}"))

    @property
    def baseline(self) -> Variant:
        """The unpruned variant of the same model."""
        return Variant(self.model)

    def with_parameters(self, parameters: Mapping[str, Any]) -> Variant:
        """The same variant with other parameters."""
        return dataclasses.replace(self, parameters=dict(parameters))


def parse(name: str) -> Variant:
    """``MODEL``, ``MODEL__METHOD`` or ``MODEL__METHOD__rRATIO`` back into a variant (ratio 0.5 if not named).

    Raises:
        ValueError: another form, or a ratio outside (0, 1].
    """
    model, separator, rest = name.partition(SEPARATOR)
    if model and not separator:
        return Variant(model)
    method, _, ratio = rest.partition(SEPARATOR)
    try:
        value = float(ratio.removeprefix("r")) if ratio else 0.5
    except ValueError:
        value = 0.0
    if not model or not method or not 0 < value <= 1 or (ratio and not ratio.startswith("r")):
        raise ValueError(
            f"model name {name!r} is not MODEL, MODEL__METHOD or MODEL__METHOD__rRATIO with 0 < RATIO <= 1"
        )
    return Variant(model, method, value)
