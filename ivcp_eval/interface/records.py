"""`Answer`: the one typed record of an answer. Journal lines, per-sample CSV and a cell's averages derive from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

from ivcp_eval.interface.failures import failure

__all__ = ["Answer", "Measured", "averages", "measured"]

Kind = Literal["text", "integer", "number", "boolean"]
Average = Literal["per sample", "per visual token", "over visual tokens"]
_TYPES: dict[Kind, tuple[type, ...]] = {"text": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,)}


@dataclass(frozen=True)
class Measured:
    """What one field of an `Answer` says.

    Attributes:
        kind, description: of its values. low, high: limits of a number, both allowed.
        column: its name in the per-sample CSV; empty if it is not there. late: files from before the column lack it.
        cell: name of its average over the answers of a cell; empty if none is made.
        average: "per sample" is the plain mean. "per visual token" weighs each sample by the visual tokens of its
            unpruned prompt, so that big images weigh as they cost; a sample without a value then counts as 1, nothing
            having been pruned. "over visual tokens" is the sum over that of the prompts' visual tokens.
    """

    kind: Kind
    description: str
    low: float | None = None
    high: float | None = None
    column: str = ""
    late: bool = False
    cell: str = ""
    average: Average = "per sample"

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError unless ``value`` is of the kind; the CSV that it is written to keeps the limits."""
        if not isinstance(value, _TYPES[self.kind]) or (isinstance(value, bool) and self.kind != "boolean"):
            raise ValueError(f"{name} of an answer is {value!r}, which is no {self.kind}")


def _of(kind: Kind, description: str, default: Any = None, **more: Any) -> Any:
    said = MappingProxyType({"measured": Measured(kind, description, **more)})
    return field(default=default, metadata=said)


def _share(description: str, **more: Any) -> Any:
    return _of("number", description, low=0, high=1, average="per visual token", **more)


@dataclass(frozen=True)
class Answer:
    """What one variant answered to one sample, or why there is no answer.

    A failure has an `error`, no text, and no measurements. Field names are the keys of a journal line.

    Attributes:
        prediction: the text as generated.
        box: grounding: the canonical box that is scored, or the words for "none in the answer"; None elsewhere.
        together: made beside other rows in half precision, where company changes how a row is rounded.
        dear: the picture was to be made smaller, and still costs more than asked.
    """

    prediction: str = _of("text", "the generated answer, unchanged", "", column="prediction")
    box: str | None = _of("text", "grounding: canonical box that is scored")
    device: str = _of("text", "what answered", "")
    visual_tokens: int | None = _of(
        *("integer", "visual tokens in the unpruned prompt"),
        low=0,
        column="visual_tokens",
        cell="visual_tokens_prompt_mean",
    )
    visual_kept: int | None = _of(
        *("integer", "visual tokens alive after the last cut"),
        low=0,
        column="visual_kept",
        cell="ratio_kept_final",
        average="over visual tokens",
    )
    ratio_layer_mean: float | None = _share(
        "share of them alive, mean over layers of the prefill", column="layer_mean_ratio", cell="ratio_layer_mean"
    )
    ratio_kv_cache: float | None = _share(
        "share of them in the KV cache, mean over layers", column="kv_ratio", cell="ratio_kv_cache"
    )
    ratio_flops: float | None = _share(
        "decoder FLOPs of its prefill over those without pruning", column="flops_ratio", cell="ratio_flops", late=True
    )
    new_tokens: int | None = _of("integer", "generated tokens", low=0, column="new_tokens", cell="new_tokens_mean")
    together: bool = _of("boolean", "made in company", False)
    dear: bool = _of("boolean", "costs more than asked at any size", False)
    error: str = _of("text", "why there is no answer; empty if there is one", "", column="error")
    traceback: str = _of("text", "innermost frames of the failure", "")

    @classmethod
    def failed(cls, error: BaseException) -> Answer:
        """In place of an answer: what went wrong."""
        return cls.from_json(failure(error))

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
        if not record.get("error") and (missing := [name for name in _NEEDED if record.get(name) is None]):
            raise ValueError(f"an answer without an error lacks {', '.join(missing)}")
        for name, value in record.items():
            if value is not None:
                meaning[name].check(name, value)
        return cls(**record)


@cache
def measured() -> dict[str, Measured]:
    """Every field of an `Answer`, in order."""
    return {f.name: f.metadata["measured"] for f in fields(Answer)}


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(Answer)}
#: What is counted for every answer; shares are left out where a prompt has no visual tokens.
_NEEDED = ("visual_tokens", "visual_kept", "new_tokens")


def averages(answers: Iterable[Answer]) -> dict[str, float | None]:
    """The averages of a cell by name; None where no answer, or no visual token, gives one.

    Args:
        answers: good ones.
    """
    answers = list(answers)
    weights = [float(answer.visual_tokens or 0) for answer in answers]
    makers: dict[Average, Callable[[list[Any]], float | None]] = {
        "per sample": lambda values: _ratio(sum(values), len(values)),
        "per visual token": lambda values: _ratio(
            sum(w * (1.0 if v is None else v) for w, v in zip(weights, values, strict=True)), sum(weights)
        ),
        "over visual tokens": lambda values: _ratio(sum(values), sum(weights)),
    }
    return {
        meaning.cell: makers[meaning.average]([getattr(answer, name) for answer in answers])
        for name, meaning in measured().items()
        if meaning.cell
    }


def _ratio(total: float, by: float) -> float | None:
    return total / by if by else None
