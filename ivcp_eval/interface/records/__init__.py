"""`Answer`: the one typed record of an answer. Journal lines and the per-sample CSV derive from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from ivcp_eval.files import storable
from ivcp_eval.interface.failures import failure

__all__ = ["Answer", "Measured", "measured"]

Kind = Literal["text", "integer", "number", "boolean", "integers"]
_TYPES: dict[Kind, tuple[type, ...]] = {
    **{"text": (str,), "integer": (int,), "number": (int, float)},
    **{"boolean": (bool,), "integers": (list, tuple)},
}


@dataclass(frozen=True)
class Measured:
    """What one field of an `Answer` says.

    Attributes:
        kind, description: of its values. low: smallest number allowed.
        column: its name in the per-sample CSV; empty if it is not there.
    """

    kind: Kind
    description: str
    low: float | None = None
    column: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError unless ``value`` is of the kind and can be written down."""
        members = value if self.kind == "integers" and isinstance(value, list | tuple) else [value]
        right = isinstance(value, _TYPES[self.kind]) and all(
            isinstance(member, bool) == (self.kind == "boolean") for member in members
        )
        if not right or (self.kind == "integers" and not all(isinstance(member, int) for member in members)):
            raise ValueError(f"{name} of an answer is {str(value)[:80]!r}, which is no {self.kind}")
        if self.low is not None and value < self.low:
            raise ValueError(f"{name} of an answer is {value}, which is below {self.low:g}")
        if self.kind == "text" and storable(value) != value:
            raise ValueError(f"{name} of an answer holds half a character (a lone surrogate)")


def _of(kind: Kind, description: str, default: Any = None, **more: Any) -> Any:
    meaning = MappingProxyType({"measured": Measured(kind, description, **more)})
    return field(default=default, metadata=meaning)


@dataclass(frozen=True)
class Answer:
    """What one variant answered to one sample, or why there is no answer.

    A failure has an `error`, no text, and no measurements. Field names are the keys of a journal line. Costs are kept
    as counts; shares are made of them whenever a record is (`engine.cost.measured`).

    Attributes:
        prediction: the text as generated.
        box: grounding: the canonical box that is scored, or the words for "none in the answer"; None elsewhere.
        visual_tokens: of the unpruned prompt; of the picture as it was, where a smaller one was asked about.
        visual_per_layer, visual_cached: per decoder layer, in the prefill.
        kv_analytic: where a method frees nothing here: what a real implementation of it would read of the visual
            tokens' cache, mean over layers and steps; None where `visual_cached` is all there is to say.
        visual_pairs, visual_mlp: where a method leaves out pairs of visual tokens and visual tokens of MLPs in the
            prefill: per decoder layer what a real implementation would compute; empty elsewhere.
        seconds_per_step: None of pictures, of one step alone, and of frames whose times nothing says.
        together: made beside other rows in half precision, where the other rows change how a row is rounded.
        over_budget: the picture was to be made smaller, and still costs more than asked.
        masks: text of `records.masks.Masks`; empty where no cut removed anything.
        settled: a failure that every further try would repeat.
    """

    prediction: str = _of("text", "the generated answer, unchanged", "", column="prediction")
    box: str | None = _of("text", "grounding: canonical box that is scored")
    device: str = _of("text", "what answered", "")
    visual_tokens: int | None = _of("integer", "visual tokens in the unpruned prompt", low=0, column="visual_tokens")
    visual_kept: int | None = _of("integer", "visual tokens alive after the last cut", low=0, column="visual_kept")
    text_tokens: int | None = _of("integer", "the prompt's other tokens", low=0)
    visual_per_layer: tuple[int, ...] = _of("integers", "visual tokens that each layer processed", ())
    visual_cached: tuple[int, ...] = _of("integers", "visual tokens in each layer's cache", ())
    kv_analytic: float | None = _of("number", "share of the visual cache that decoding would read", low=0)
    visual_pairs: tuple[int, ...] = _of(
        "integers", "pairs of visual tokens that each layer's attention would look at", ()
    )
    visual_mlp: tuple[int, ...] = _of("integers", "visual tokens that each layer's MLP would process", ())
    seconds_per_step: float | None = _of(
        "number", "from one grid step of its first video to the next, mean", low=0, column="seconds_per_step"
    )
    prompt_tokens: int | None = _of(
        "integer", "prompt tokens as a server counts them (`usage`); empty: not served", low=0, column="prompt_tokens"
    )
    new_tokens: int | None = _of("integer", "generated tokens", low=0, column="new_tokens")
    together: bool = _of("boolean", "batched with others in half precision", False)
    over_budget: bool = _of("boolean", "costs more than asked at any size", False)
    nonfinite_scores: int = _of("integer", "scores of visual tokens that were NaN or infinite", 0, low=0)
    masks: str = _of("text", "which visual tokens each cut kept, and where they lie in the picture", "", column="masks")
    error: str = _of("text", "why there is no answer; empty if there is one", "", column="error")
    settled: bool = _of("boolean", "the failure is final", False)
    traceback: str = _of("text", "innermost frames of the failure", "")

    @classmethod
    def failed(cls, error: BaseException) -> Answer:
        """In place of an answer: what went wrong."""
        return cls.from_json(failure(error))

    @property
    def is_settled(self) -> bool:
        """Whether no other try is needed: there is an answer, or there can be none."""
        return not self.error or self.settled

    @property
    def scored(self) -> str:
        """The text that the benchmark's evaluation gets; empty for a failure, which counts as wrong."""
        return self.prediction if self.box is None else self.box

    def to_json(self) -> dict[str, Any]:
        """For a journal line: every field that differs from its default."""
        return {name: value for name, value in vars(self).items() if value != _DEFAULTS[name]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Answer:
        """What `to_json` gave.

        Raises:
            ValueError: a key that no field has, a good answer without a measurement, or a value of another kind.
        """
        meaning = measured()
        if strange := sorted(record.keys() - meaning.keys()):
            raise ValueError(f"unknown keys of an answer: {', '.join(strange)}; known: {', '.join(meaning)}")
        if not record.get("error") and (
            missing := [name for name in _needed(record) if record.get(name) in (None, [])]
        ):
            raise ValueError(f"an answer without an error lacks {', '.join(missing)}")
        for name, value in record.items():
            if value is not None or _DEFAULTS[name] is not None:
                meaning[name].check(name, value)
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
        return cls(**values)


@cache
def measured() -> dict[str, Measured]:
    """Every field of an `Answer`, in order."""
    return {f.name: f.metadata["measured"] for f in fields(Answer)}


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Answer)}
#: What is counted for every answer, and of those that a server gave.
_SERVED = ("prompt_tokens", "new_tokens")
_NEEDED = ("visual_tokens", "visual_kept", "text_tokens", "visual_per_layer", "visual_cached", "new_tokens")


def _needed(record: Mapping[str, Any]) -> tuple[str, ...]:
    return _NEEDED if record.get("prompt_tokens") is None else _SERVED
