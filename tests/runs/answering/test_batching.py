"""How many samples go together, and that nothing but their number decides it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.runs.answering.batching import MOST_CPU, SHARE, batch_size, row_bytes
from ivcp_eval.runs.answering.session import Session
from tests.runs.conftest import Bench

SHAPE = DecoderShape(layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, intermediate=18944)


def session(device: str = "cpu") -> Any:
    return SimpleNamespace(
        placement=SimpleNamespace(device=device),
        prompt_tokens=len,
        model=torch.nn.Linear(2, 2),
        shape=SHAPE,
        limits=SimpleNamespace(max_new_tokens=100),
    )


def test_a_row_is_its_caches_and_what_is_in_flight() -> None:
    """Qwen2.5-VL-7B in bfloat16: 57,344 bytes of cache a token, as its documentation's formula gives."""
    cache = 57344 * (1000 + 2 * 1100)
    activations = 2 * 1000 * (8 * 3584 + 3 * 18944) * 2
    assert row_bytes(SHAPE, 1000, 100, variants=2, itemsize=2) == cache + activations


@pytest.mark.parametrize(("rows", "wanted"), [(0.2, 1), (2.5, 2), (1000.0, MOST_CPU)])
def test_as_many_as_fit_and_no_more_than_gain(rows: float, wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt: Any = range(1000)
    total = rows * row_bytes(SHAPE, 1000, 100, 2, 4) / SHARE
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total))
    assert batch_size(session(), [prompt], variants=2) == wanted


def test_the_longest_sample_that_can_be_read_decides() -> None:
    asked: list[int] = []

    def prompt_tokens(parts: Any) -> int:
        asked.append(parts)
        if parts == 1:
            raise OSError("cannot be decoded")
        return 10

    found = session()
    found.prompt_tokens = prompt_tokens
    assert batch_size(found, iter([1, 2, 3]), 1) == MOST_CPU  # type: ignore[list-item]
    assert asked == [1, 2]
    found.prompt_tokens = lambda parts: (_ for _ in ()).throw(OSError("none of them"))
    assert batch_size(found, iter([1]), 1) == 1  # type: ignore[list-item]


def test_batches_are_the_default_and_change_no_answer(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.call("run", "--quiet") == 0
    batched = bench.elsewhere(bench.folder.parent / "batched")
    bench.spec.write_text(bench.spec.read_text().replace("batch: 1\n", "").replace("shard: 3", "shard: 5"))
    sizes: list[int] = []
    answer_batch = Session.answer_batch

    def counted(self: Session, conversations: Any, *more: Any) -> Any:
        sizes.append(len(conversations))
        return answer_batch(self, conversations, *more)

    monkeypatch.setattr(Session, "answer_batch", counted)
    assert batched.call("run", "--quiet") == 0
    assert sizes == [4, 4], "five samples a benchmark: four together, one alone"
    assert batched.results() == bench.results()
