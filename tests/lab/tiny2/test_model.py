"""The shipped second embedded model loads from stock classes, answers, and its benchmarks are the generator's."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.benchmarks import load as load_benchmark
from ivcp_eval.files import DATASETS
from ivcp_eval.lab.tiny.evaluate import load
from ivcp_eval.lab.tiny2 import build_benchmarks, evaluate

MODEL = Path(evaluate.__file__).with_name("model")
ACCEPTANCE = DATASETS.parent / "results" / "tiny2" / "acceptance.json"


@pytest.fixture(scope="module")
def asker() -> evaluate.Asker:
    return evaluate.Asker(MODEL)


def test_it_is_small_and_stock(asker: evaluate.Asker) -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 24_000_000
    assert type(asker.model).__module__.startswith("transformers.")
    assert type(asker.model).__name__ == "Qwen2_5_VLForConditionalGeneration"


def test_it_loads_in_three_seconds(asker: evaluate.Asker) -> None:
    del asker  # transformers is imported by now; only the checkpoint's own load is timed
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        load(MODEL)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 3


@pytest.mark.parametrize("task", ["grounding", "short"])
def test_a_slice_is_answered_as_recorded(asker: evaluate.Asker, task: str) -> None:
    """48 questions of the validation split; chance may carry such a slice 15 points from the accuracy on test."""
    batch = list(islice(evaluate.questions("validation", 48, task), 48))
    answers = asker.ask(batch[:24], "none", 1.0) + asker.ask(batch[24:], "none", 1.0)
    record: dict[str, Any] = json.loads(ACCEPTANCE.read_text(encoding="utf-8"))
    name = {"grounding": "unpruned grounding", "short": "unpruned short answers"}[task]
    (recorded,) = [float(f["measured"].split(" %")[0]) for f in record["figures"] if f["what"] == name]
    score = 100 * sum(answer.right for answer in answers) / len(answers)
    assert abs(score - recorded) < 15
    assert all(len(answer.kept) == 256 for answer in answers)


@pytest.mark.parametrize("task", build_benchmarks.TASKS)
def test_the_benchmark_is_what_the_generator_writes(task: str) -> None:
    """The first 40 questions, byte for byte; the checksum of the whole file is the declared one."""
    path = DATASETS / f"tiny2_{task}.tsv"
    assert path.read_bytes().startswith(build_benchmarks.build(task, "test", 40))
    assert path.read_bytes().count(b"\n") == 301
    assert load_benchmark(f"tiny2_{task}").n_samples == 300
