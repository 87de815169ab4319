"""What is asked: a family's wording of a benchmark's questions, and the model that VLMEvalKit's loop sees.

The module imports VLMEvalKit; go through `ivcp_eval.vlmeval_bridge`. Who answers is handed in.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from vlmeval.dataset import DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from ivcp_eval import benchmarks
from ivcp_eval.interface import AbstractAdapter, QuestionKind

Message = list[dict[str, Any]]

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


@dataclass(frozen=True)
class Prompting:
    """How a family words the questions of a data set; the same for every variant."""

    adapter: AbstractAdapter

    def kind(self, dataset: str) -> QuestionKind | None:
        """The kind of its questions, if the family has wording of its own for them in this data set."""
        benchmark = benchmark_of(dataset)
        if benchmark.prompt != "family" or benchmark.kind is None:
            return None
        return None if self.adapter.prompt(benchmark.kind, "", {}) is None else benchmark.kind

    def message(self, line: Any, kind: QuestionKind, pictures: Callable[[Any], Any]) -> Message:
        """The images, then the family's wording of a question of this kind.

        Args:
            line: a row of the data set. pictures: unpacks the row's, and gives their paths.
        """
        options = {c: str(line[c]) for c in string.ascii_uppercase if c in line and _present(line[c])}
        hint = str(line["hint"]) if "hint" in line and _present(line["hint"]) else ""
        text = self.adapter.prompt(kind, str(line["question"]), options, hint)
        assert text is not None
        paths = pictures(line)
        paths = paths if isinstance(paths, list) else [paths]
        return [*({"type": "image", "value": path} for path in paths), {"type": "text", "value": text}]


class BridgedVLM(BaseModel):
    """A VLMEvalKit model whose answers come from a function.

    Args:
        name: of the prediction files. answer: (message, data set's name or None) -> text.
    """

    INTERLEAVE = True

    def __init__(self, name: str, prompting: Prompting, answer: Callable[[Message, str | None], str]) -> None:
        super().__init__()
        self.name, self.prompting, self.answer = name, prompting, answer

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether the family has wording of its own for this data set."""
        return self.prompting.kind(dataset) is not None

    def build_prompt(self, line: Any, dataset: str) -> Message:
        """See `Prompting.message`."""
        kind = benchmark_of(dataset).kind
        assert kind is not None
        return self.prompting.message(line, kind, self.dump_image_func)

    def generate_inner(self, message: Message, dataset: str | None = None) -> str:
        """The answer."""
        return self.answer(message, dataset)


def _present(cell: Any) -> bool:
    return not pd.isna(cell) and str(cell) != ""
