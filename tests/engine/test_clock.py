"""The clock: what counts as vision, prefill and decoding, and that it leaves nothing behind."""

from __future__ import annotations

import time

import pytest
import torch

from ivcp_eval.engine import prune
from ivcp_eval.engine.cost import clock, rounds
from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.interface.registry import adapter
from ivcp_eval.lab.bench import models as bench_models

SIZE = bench_models.size("tiny")
ADAPTER = adapter("qwen2_5_vl")
DELAY = 0.2  # seconds; far more than any phase of the tiny model takes, also on a busy machine


@pytest.fixture(scope="module")
def model():
    return bench_models.build_model(bench_models.configuration(SIZE), "cpu", torch.float32, "sdpa")


@pytest.fixture(scope="module")
def inputs(model):
    return bench_models.make_inputs(model.config, 16, 2, 12, torch.float32, "cpu")


def generate(model, inputs, tokens=3):
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)


def hook_counts(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.fixture
def slow():
    """A function that makes a module's forward ``DELAY`` seconds slower, until the test ends."""
    handles = []

    def delay(module):
        handles.append(module.register_forward_pre_hook(lambda *_: time.sleep(DELAY)))

    yield delay
    for handle in handles:
        handle.remove()


def test_counts_and_cache_size(model, inputs):
    with clock.phases(model, ADAPTER) as found:
        output = generate(model, inputs, tokens=3)
    assert output.shape[1] - inputs["input_ids"].shape[1] == found.new_tokens == 3
    assert (found.prefills, found.decode_steps) == (1, 2)
    text = model.config.text_config
    tokens = 2 * (16 + 12)
    head = text.hidden_size // text.num_attention_heads
    assert found.kv_bytes == tokens * text.num_hidden_layers * 2 * text.num_key_value_heads * head * 4
    assert found.peak_bytes is None
    assert min(found.vision_ms, found.prefill_ms, found.decode_ms) > 0
    assert found.decode_ms_per_token == found.decode_ms / 2


@pytest.mark.parametrize("where", ["vision", "decoder"])
def test_time_goes_to_the_phase_that_spent_it(model, inputs, slow, where):
    slow(model.model.visual if where == "vision" else model.model.language_model.layers[0])
    with clock.phases(model, ADAPTER) as found:
        generate(model, inputs, tokens=3)
    milliseconds = DELAY * 1e3
    if where == "vision":
        assert found.vision_ms >= milliseconds > found.prefill_ms
    else:
        assert found.prefill_ms >= milliseconds > found.vision_ms
        assert found.decode_ms_per_token >= milliseconds


@pytest.mark.parametrize("inside", [True, False])
def test_pruning_counts_as_prefill_whichever_block_is_entered_first(model, inputs, monkeypatch, inside):
    from ivcp_eval.engine.hooks import Engine
    from ivcp_eval.engine.prefill import Cutter, Prefill

    for owner, name in ((Engine, "_before_text_model"), (Cutter, "cut"), (Prefill, "finish")):
        stock = getattr(owner, name)

        def slower(self, *args, stock=stock, **kwargs):
            time.sleep(DELAY)
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, slower)
    blocks = [lambda: prune(model, "ivc_prune", 0.5, layer=1), lambda: clock.phases(model, ADAPTER)]
    with blocks[not inside]() as first, blocks[inside]() as second:
        generate(model, inputs, tokens=1)
    found = second if inside else first
    assert found.prefill_ms >= 3 * DELAY * 1e3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_events_agree_with_the_synchronised_clock(model, inputs):
    on_gpu = bench_models.build_model(bench_models.configuration(SIZE), "cuda", torch.bfloat16, "sdpa")
    there = {name: tensor.cuda() for name, tensor in inputs.items()}
    generate(on_gpu, there)
    with clock.phases(on_gpu, ADAPTER) as found:
        total = clock.timed(lambda: generate(on_gpu, there, tokens=20), "cuda")
    parts = found.vision_ms + found.prefill_ms + found.decode_ms
    assert 0.5 * total < parts <= total
    assert found.peak_bytes > sum(parameter.nbytes for parameter in on_gpu.parameters())


def test_text_without_image_and_several_calls(model, inputs):
    ids = inputs["input_ids"][:, -4:]
    with clock.phases(model, ADAPTER) as found:
        for _ in range(2):
            generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokens=2)
    assert (found.vision_ms, found.prefills, found.decode_steps, found.new_tokens) == (0, 2, 2, 4)


def test_time_between_calls_is_nobodys(model, inputs):
    with clock.phases(model, ADAPTER) as found:
        generate(model, inputs, tokens=2)
        time.sleep(2)
        generate(model, inputs, tokens=2)
    assert found.vision_ms + found.prefill_ms + found.decode_ms < 2000


def test_no_vision_encoder(model):
    with clock.phases(model.model.language_model, _TextOnly()) as found, torch.inference_mode():
        model.model.language_model(input_ids=torch.arange(8)[None])
    assert found.vision_ms is None
    assert found.prefills == 1
    assert found.decode_ms_per_token is None


class _TextOnly(type(ADAPTER)):
    def multimodal_model(self, model):
        return model

    def text_model(self, model):
        return model


def test_nothing_stays_behind_also_after_an_error(model, inputs):
    before = hook_counts(model)
    with pytest.raises(ValueError, match="features and image tokens"), clock.phases(model, ADAPTER):
        generate(model, {**inputs, "input_ids": inputs["input_ids"].clamp_max(3)})
    assert hook_counts(model) == before


def test_a_forward_that_failed_is_not_counted(model, inputs):
    layer = model.model.language_model.layers[1]
    with clock.phases(model, ADAPTER) as found:
        handle = layer.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="broken"):
            generate(model, inputs)
        handle.remove()
        generate(model, inputs, tokens=2)
    assert (found.prefills, found.decode_steps) == (1, 1)


def _fail(*_):
    raise RuntimeError("broken")


def test_hook_time_is_the_cut(model, inputs, slow):
    text = model.model.language_model
    with prune(model, "ivc_prune", 0.5, layer=1):
        slow(text.layers[1])
        with clock.hook_time(text.layers[1]) as cut, clock.hook_time(text.layers[2]) as later:
            generate(model, inputs, tokens=2)
    assert len(cut.ms) == len(later.ms) == 2
    assert min(cut.ms) >= DELAY * 1e3 > max(later.ms)


def test_cpu_time_does_not_count_waiting(model, inputs, slow):
    slow(model.model.language_model.layers[0])
    with clock.phases(model, ADAPTER, cpu_time=True) as found:
        generate(model, inputs, tokens=1)
    assert 0 < found.prefill_ms < DELAY * 1e3


def test_interleave_rotates_and_drops_the_warm_up():
    calls = []
    functions = {name: (lambda name=name: calls.append(name) or len(calls)) for name in "abc"}
    results = rounds.interleave(functions, rounds=2, warmup=1)
    assert "".join(calls) == "aabbcc" + "bca", "each is called once before it counts"
    assert results == {"a": [2, 9], "b": [4, 7], "c": [6, 8]}


def test_interleave_stops_between_rounds():
    results = rounds.interleave({"a": lambda: 1, "b": lambda: 2}, rounds=9, seconds=0)
    assert results == {"a": [1], "b": [2]}


def test_a_long_first_call_counts(monkeypatch):
    monkeypatch.setattr(rounds, "LONG_S", -1.0)
    numbers = iter(range(9))
    assert rounds.interleave({"a": lambda: next(numbers)}, rounds=2, warmup=3) == {"a": [0, 1]}


def test_a_series_that_is_cut_goes_on_behind_its_last_call():
    """Wherever it is cut: nothing is called again but a warm-up, and the order of the rounds stays."""
    whole = [name for start in range(3) for name in ("abc"[start:] + "abc"[:start])]
    for end in range(1, 9):
        calls, kept = [], {}

        def call(name, calls=calls, end=end):
            if len(calls) == end:
                raise KeyboardInterrupt
            calls.append(name)
            return len(calls)

        functions = {name: (lambda name=name, call=call: call(name)) for name in "abc"}
        with pytest.raises(KeyboardInterrupt):
            rounds.interleave(functions, 3, warmup=0, kept=kept)
        functions = {name: (lambda name=name, calls=calls: calls.append(name) or len(calls)) for name in "abc"}
        found = rounds.interleave(functions, 3, warmup=0, kept=kept)
        assert calls == whole
        assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_the_time_of_earlier_calls_counts_and_a_begun_round_is_ended():
    kept = {("a", 0): (5.0, "first"), ("b", 0): (5.0, "second"), ("b", 1): (5.0, "fourth")}
    functions = {"a": lambda: "new", "b": lambda: "new"}
    assert rounds.interleave(functions, 9, seconds=12, kept=kept) == {"a": ["first", "new"], "b": ["second", "fourth"]}
    del kept["a", 1], kept["b", 1]
    assert rounds.interleave(functions, 9, seconds=9, kept=kept) == {"a": ["first"], "b": ["second"]}


def test_spread():
    assert rounds.Spread.of([3.0]) == rounds.Spread(3, 3, 3, 1)
    assert rounds.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == rounds.Spread(3, 2, 4, 5)
    assert rounds.Spread.of_ratios([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]).median == 3
    with pytest.raises(ValueError):
        rounds.Spread.of([])


def test_timed():
    assert DELAY * 1e3 <= clock.timed(lambda: time.sleep(DELAY)) < 10 * DELAY * 1e3


def test_flops_of_a_layer_by_hand():
    shape = DecoderShape(layers=2, hidden=8, heads=4, kv_heads=2, head_dim=2, intermediate=16)
    tokens = 3
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    pairs = 1 + 2 + 3  # a causal row sees itself and what is before it
    assert shape.layer_flops(tokens) == 2 * tokens * weights + pairs * 4 * (2 * 2 + 2 * 2)
    assert shape.prefill_flops([3, 1]) == shape.layer_flops(3) + shape.layer_flops(1)
    with pytest.raises(ValueError, match="2"):
        shape.prefill_flops([3])


def test_linear_flops_are_those_torch_counts(model):
    from torch.utils.flop_counter import FlopCounterMode

    text = model.model.language_model
    shape, tokens = DecoderShape.of(model.config.text_config), 5
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        for module in text.layers[0].modules():
            if isinstance(module, torch.nn.Linear):
                module(torch.zeros(tokens, module.in_features))
    pairs = tokens * (tokens + 1) // 2
    assert shape.layer_flops(tokens) - 4 * pairs * shape.heads * shape.head_dim == counter.get_total_flops()
