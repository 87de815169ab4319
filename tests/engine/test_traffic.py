"""Bytes that a decoder reads, counted by hand, and the times that they take at a given bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ivcp_eval.engine.cost import clock, traffic
from ivcp_eval.engine.cost.traffic import Traffic, copy_bandwidth, stored_bytes
from ivcp_eval.interface.registry import adapter
from ivcp_eval.lab.bench import models


@pytest.fixture(scope="module")
def model() -> Any:
    return models.build_model(models.configuration(models.size("tiny")), "cpu", torch.bfloat16, "sdpa")


def test_a_step_reads_layers_head_and_cache_but_no_embedding_table(model: Any) -> None:
    hidden, heads, kv_heads, intermediate, vocabulary, layers = 64, 4, 2, 128, 2048, 3
    width = hidden // heads
    attention = hidden * width * (2 * heads + 2 * kv_heads) + width * (heads + 2 * kv_heads)  # with biases
    parameters = layers * (attention + 3 * hidden * intermediate + 2 * hidden) + hidden
    found = Traffic.of(model, adapter("qwen2_5_vl"), 1e9)
    assert (found.layers, found.head) == (2 * parameters, 2 * hidden * vocabulary)
    assert found.prefill_ms(500) == pytest.approx(1e3 * (2 * parameters + 500) / 1e9)
    assert found.decode_ms(500) == pytest.approx(found.prefill_ms(500) + 1e3 * found.head / 1e9)
    assert replace(found, bandwidth=2e9).decode_ms(500) == pytest.approx(found.decode_ms(500) / 2)


def test_shared_tensors_are_stored_once() -> None:
    one, other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    assert stored_bytes([*one.parameters(), *other.parameters()]) == 128
    assert stored_bytes([*one.parameters(), *one.parameters()]) == 64


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    took = iter([900.0, 500.0, 250.0, 500.0, 700.0])

    def timed(copy: Callable[[], Any], device: torch.device, *, cpu_time: bool) -> float:
        assert copy().sum() == 2**20, "it is really copied"
        assert cpu_time
        return next(took)

    monkeypatch.setattr(traffic, "timed", timed)
    monkeypatch.setattr(traffic, "_COPIED", {"cpu": 2**20})
    assert copy_bandwidth("cpu", cpu_time=True) == 2 * 2**20 / 0.25, "the best one"


def test_processor_time_is_not_elapsed_time() -> None:
    assert clock.timed(lambda: time.sleep(0.05)) >= 50
    assert clock.timed(lambda: time.sleep(0.05), cpu_time=True) < 25
