"""A session as a VLMEvalKit model. The module imports VLMEvalKit; go through `ivcp_eval.vlmeval_bridge`."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import pandas as pd
from vlmeval.dataset import DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from ivcp_eval import benchmarks
from ivcp_eval.engine.cost.predicted import Decoder, solve_budget
from ivcp_eval.interface import QuestionKind, models, variants
from ivcp_eval.interface.failures import FAILURES, device_lost, failure, settled
from ivcp_eval.interface.registry import default_parameters
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement
from ivcp_eval.runs.store.journal import Journal
from ivcp_eval.vlmeval_bridge.datasets import message_key

# As VLMEvalKit's own Qwen adapter decides where it uses its wording: Y/N only where the set asks no format itself.
_STOCK_KINDS: Mapping[str, QuestionKind] = {"MCQ": "mcq", "VQA": "short_answer"}
_YES_NO_SETS = ("POPE", "HallusionBench")


def benchmark_of(dataset: str) -> benchmarks.Benchmark:
    """The declared benchmark behind a VLMEvalKit data set name, or one made from VLMEvalKit's own type."""
    for name in benchmarks.names():
        if benchmarks.load(name).vlmeval == dataset:
            return benchmarks.load(name)
    kind: QuestionKind | None = _STOCK_KINDS.get(DATASET_TYPE(dataset, default="") or "")
    if dataset in _YES_NO_SETS:
        kind = "yes_no"
    return benchmarks.Benchmark(name=dataset, vlmeval=dataset, kind=kind, prompt="family" if kind else "dataset")


class PrunedVLM(BaseModel):
    """Answers through a `Session`; with a journal, never answers the same prompt twice."""

    INTERLEAVE = True

    def __init__(self, session: Session, variant: Variant, journal: Journal | None = None) -> None:
        super().__init__()
        self.session, self.variant, self.journal = session, variant, journal

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether the family has wording of its own for this data set; the same for every variant."""
        benchmark = benchmark_of(dataset)
        return bool(
            benchmark.prompt == "family"
            and benchmark.kind
            and self.session.adapter.prompt(benchmark.kind, "", {}) is not None
        )

    def build_prompt(self, line: Any, dataset: str) -> list[dict[str, str]]:
        """The images, then the family's wording of the question."""
        kind = benchmark_of(dataset).kind
        assert kind is not None
        options = {c: str(line[c]) for c in string.ascii_uppercase if c in line and _present(line[c])}
        hint = str(line["hint"]) if "hint" in line and _present(line["hint"]) else ""
        text = self.session.adapter.prompt(kind, str(line["question"]), options, hint)
        assert text is not None
        paths = self.dump_image(line, dataset)
        paths = paths if isinstance(paths, list) else [paths]
        return [*({"type": "image", "value": path} for path in paths), {"type": "text", "value": text}]

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer, from the journal if it is there; a sample that fails is journalled with its error.

        Raises:
            RuntimeError: the sample failed and there is no journal, or the process lost its GPU, as all others would.
        """
        key = message_key(message)
        known = self.journal.records.get(key) if self.journal else None
        if known is not None and settled(known):
            return str(known["prediction"])
        record = self._answer(message, dataset)
        if self.journal:
            self.journal.append({"key": key, **record})
        elif record["error"]:
            raise RuntimeError(record["error"])
        if record["error"] and device_lost(self.session.model):
            line = record["error"].partition("\n")[0]
            raise RuntimeError(f"this process lost its GPU ({line}); run the same command again to continue")
        return str(record["prediction"])

    def _answer(self, message: list[dict[str, str]], dataset: str | None) -> dict[str, Any]:
        parts = [{part["type"]: part["value"]} for part in message]
        grounding = dataset is not None and benchmark_of(dataset).kind == "grounding"
        try:
            return {**self.session.answer(parts, self.variant, grounding), "error": ""}
        except FAILURES as error:
            # One sample must not end the run: it is kept, counted, retried next time, and marks the cell incomplete.
            return failure(error)


class RecordedVLM(PrunedVLM):
    """Answers from a finished journal alone, failures included; needs no weights."""

    def __init__(self, family: str, variant: Variant, journal: Journal) -> None:
        from types import SimpleNamespace

        from ivcp_eval.interface.registry import adapter

        super().__init__(SimpleNamespace(adapter=adapter(family)), variant, journal)  # type: ignore[arg-type]

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The recorded answer, empty for a sample that failed or was never answered, which is then noted."""
        assert self.journal is not None
        key = message_key(message)
        if key not in self.journal.records:
            # Its picture could not be read when the others were answered, and can be now.
            error = LookupError(f"no answer was made to a prompt of {dataset}; run the sweep with --retry-failed")
            self.journal.append({"key": key, **failure(error)})
        return str(self.journal.records[key]["prediction"])


def _present(cell: Any) -> bool:
    return not pd.isna(cell) and str(cell) != ""


def from_variant_name(name: str, **_: Any) -> PrunedVLM:
    """What VLMEvalKit's registry calls: load the model of a variant's name on the default device."""
    variant = variants.parse(name)
    weights = models.locate(variant.model)
    placement = Placement().resolve()
    session = Session(weights, placement, Limits.published(weights))
    own = weights.checkpoint.methods.get(variant.method, {})
    variant = variant.tuned(own, default_parameters(variant.method))
    if variant.budget is not None:
        variant = solve_budget(variant, Decoder.of(weights))
    session.check(variant)
    return PrunedVLM(session, variant)
