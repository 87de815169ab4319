"""The shipped tiny model loads from stock classes and still answers as recorded (a small slice, unpruned)."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from ivcp_eval.lab.tiny.build_benchmarks import BENCHMARKS, DATASETS
from ivcp_eval.lab.tiny.evaluate import SHIPPED_MODEL, answer, evaluate, load, read_benchmark

RECORD = json.loads((SHIPPED_MODEL.parent / "training" / "record" / "run.json").read_text(encoding="utf-8"))
#: Questions per benchmark looked at here, and how far chance may carry such a slice from the recorded accuracy.
SLICE, BAND = 48, 20.0


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return load(SHIPPED_MODEL)


def test_size_and_architecture(shipped: tuple[Any, Any]) -> None:
    model, _ = shipped
    weights = SHIPPED_MODEL / "model.safetensors"
    assert weights.stat().st_size <= 12_000_000
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(model).__module__.startswith("transformers.")
    assert sum(p.numel() for p in model.parameters()) <= 5_500_000


def test_loads_in_two_seconds(shipped: tuple[Any, Any]) -> None:
    del shipped  # transformers is imported by now; only the checkpoint's own load is timed
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        load(SHIPPED_MODEL)
        best = min(best, time.perf_counter() - began)
    assert best < 2


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_accuracy_of_a_slice_is_in_the_recorded_band(shipped: tuple[Any, Any], name: str) -> None:
    every = read_benchmark(DATASETS / name)
    questions = every[:: len(every) // SLICE][:SLICE]
    score = evaluate(*shipped, questions, batch_size=24)["overall"]
    recorded = RECORD["held_out"][name]["overall"]
    assert recorded - BAND <= score <= recorded + BAND


def test_batched_answers_equal_single_ones(shipped: tuple[Any, Any]) -> None:
    questions = read_benchmark(DATASETS / "tiny_grounding.tsv", 4)
    questions += read_benchmark(DATASETS / "tiny_short.tsv", 2)
    together = answer(*shipped, questions)
    assert together == [answer(*shipped, [question])[0] for question in questions]


def test_answers_depend_on_the_picture(shipped: tuple[Any, Any]) -> None:
    """Exchanged pictures must cost accuracy, or the model would be guessing from the questions."""
    from ivcp_eval.lab.tiny.evaluate import Question

    questions = read_benchmark(DATASETS / "tiny_short.tsv", SLICE)
    exchanged = [Question(b.image, a.sample) for a, b in zip(questions, questions[8:] + questions[:8], strict=True)]
    right = evaluate(*shipped, questions, batch_size=24)["overall"]
    wrong = evaluate(*shipped, exchanged, batch_size=24)["overall"]
    assert right > wrong + 15


def test_any_text_can_be_asked(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    inputs = processor.tokenizer("Größe — 尺寸 🙂 <unk>?", return_tensors="pt")
    assert processor.tokenizer.decode(inputs["input_ids"][0]) == "Größe — 尺寸 🙂 <unk>?"
    with torch.inference_mode():
        out = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2)
    assert out.shape[1] > inputs["input_ids"].shape[1]
