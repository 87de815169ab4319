"""VLMEvalKit once per process, miniature files in a data root of their own, and models that answer from a list."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval import benchmarks
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.registry import adapter
from ivcp_eval.interface.variants import Variant
from ivcp_eval.runs.answering.prompts import Prompts
from ivcp_eval.runs.records.record import sample_rows
from ivcp_eval.runs.records.sample_rows import samples
from ivcp_eval.runs.records.scores import Made, Scores
from ivcp_eval.vlmeval_bridge.judge import Question
from tests.answers import answer
from tests.vlmeval_bridge.miniatures import Miniature, miniatures

if importlib.util.find_spec("vlmeval") is None:
    pytest.skip("VLMEvalKit is not installed", allow_module_level=True)


class RecordingSession:
    """Stands where a loaded model would, behind the real prompts; answers by prompt and keeps what it was sent."""

    def __init__(self, answers: Mapping[str, str] | None = None, family: str = "qwen2_5_vl") -> None:
        self.adapter = adapter(family)
        self.answers = answers
        self.sent: list[tuple[str, str]] = []

    def answer(self, parts: Sequence[Mapping[str, Any]], variant: Variant, grounding: bool = False) -> Answer:
        from ivcp_eval.vlmeval_bridge.datasets import message_key

        message = [{"type": kind, "value": value} for part in parts for kind, value in part.items()]
        key = message_key(message)
        self.sent.append((key, json.dumps(message)))
        text = "" if self.answers is None else self.answers[key]
        return answer(text)


class ListJudge:
    """A judge that knows what to say, for the path from verdicts to scores; the real client is tested elsewhere."""

    identity = "test@1"

    def __init__(self, say: Callable[[str], str]) -> None:
        self.say = say
        self.asked: list[Question] = []

    def rate(self, questions: Sequence[Question]) -> list[str | None]:
        self.asked += questions
        return [question.parse(self.say(question.prediction)) for question in questions]


@dataclass
class Laboratory:
    """A data root with miniature files, and a way to send models through VLMEvalKit.

    Attributes:
        root: the data root. work: for prediction files. checksums: of the real files, as VLMEvalKit notes them.
    """

    root: Path
    work: Path
    checksums: Mapping[str, str]
    _built: dict[str, Any] = field(default_factory=dict)

    def dataset(self, name: str) -> Any:
        """VLMEvalKit's real object for a miniature."""
        from ivcp_eval.vlmeval_bridge import evaluate as bridge

        if name not in self._built:
            miniatures()[name].write(self.root / f"{name}.tsv")
            self._built[name] = bridge.build(benchmarks.load(name), None)
        return self._built[name]

    def model(self, session: RecordingSession, variant: Variant | None = None) -> Any:
        from ivcp_eval.runs.answering.live import live_model

        return live_model(session, variant or Variant("tiny"))  # type: ignore[arg-type]

    def infer(self, name: str, answers: Mapping[str, str]) -> tuple[Any, Any, Path]:
        """(data set, prompts, prediction file) of a model with these answers, through VLMEvalKit's loop."""
        from ivcp_eval.vlmeval_bridge import evaluate as bridge

        dataset = self.dataset(name)
        prompts = Prompts.of(bridge.messages(dataset, self.model(RecordingSession()).prompting))
        assert not prompts.broken
        by_key = {key: answers[index] for index, key in prompts.keys.items()}
        assert len(by_key) == len(prompts.keys), "two rows of a miniature have one prompt"
        model = self.model(RecordingSession(by_key))
        return dataset, prompts, bridge.infer(dataset, model, self.work / name, {})

    def score(self, name: str, answers: Mapping[str, str], judge: Any = None) -> tuple[Any, list[dict[str, Any]]]:
        """What the bridge reads from VLMEvalKit's evaluation, and the per-sample rows."""
        from ivcp_eval.vlmeval_bridge import evaluate as bridge

        benchmark = benchmarks.load(name)
        dataset, prompts, predictions = self.infer(name, answers)
        scored = bridge.score(benchmark, dataset, predictions, judge)
        lines = dataset.data.drop(columns="image", errors="ignore").to_dict("records")
        facts = Scores(Made(), {}, samples(benchmark, lines, prompts, scored))
        return scored, sample_rows({key: answer(answers[index]) for index, key in prompts.keys.items()}, facts)


def judge_for(miniature: Miniature) -> ListJudge | None:
    return ListJudge(miniature.judge) if miniature.judge else None


def _without_checksums(load: Any) -> Any:
    """`benchmarks.load`, for which a miniature is as good as the real file."""

    @functools.wraps(load)
    def loaded(name: str) -> benchmarks.Benchmark:
        return replace(load(name), md5="") if name in miniatures() else load(name)

    return loaded


@pytest.fixture(scope="package")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """The real classes refuse a file with another checksum by fetching it anew, so the miniatures bring theirs."""
    from ivcp_eval.vlmeval_bridge import register

    register()
    import vlmeval.dataset

    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "LMUData").mkdir()
    checksums: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMUData", str(folder / "LMUData"))
        for cls in vlmeval.dataset.DATASET_CLASSES:
            for name in set(getattr(cls, "DATASET_MD5", {})) & set(miniatures()):
                checksums.setdefault(name, cls.DATASET_MD5[name])  # subclasses share the mapping
                patch.setitem(cls.DATASET_MD5, name, None)
        patch.setattr(benchmarks, "load", _without_checksums(benchmarks.load))
        yield Laboratory(folder / "LMUData", folder / "work", checksums)
