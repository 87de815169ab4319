"""Every transformers release from the oldest supported on: names of arguments, and no silent difference."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

import ivcp_eval
from ivcp_eval.engine.hooks import selftest
from ivcp_eval.interface import names, registry
from tests.engine import tiny_models
from tests.engine.contract.cases import SINGLE, Case

ENGINE = Path(ivcp_eval.engine.__file__).parent  # type: ignore[attr-defined]


@pytest.fixture
def fresh() -> Iterator[None]:
    """No class has passed its self-test."""
    passed = set(selftest._passed)
    selftest._passed.clear()
    yield
    selftest._passed.clear()
    selftest._passed.update(passed)


def test_the_cache_is_read_by_either_name() -> None:
    cache, other = DynamicCache(), object()
    for spelled in ("cache", "past_key_values"):
        assert names.read({spelled: cache, "use_cache": True}, "cache") is cache
        assert names.write({spelled: cache}, cache=other) == {spelled: other}
    assert names.read({"cache": None, "past_key_values": cache}, "cache") is cache
    assert names.write({}, cache=other) == {names.spelling("cache"): other}


def test_only_one_file_of_the_engine_knows_the_names() -> None:
    """A name that is read elsewhere would be read wrongly after the next rename."""
    raw = re.compile(r"""kwargs(\.get\(|\[)["']|past_key_values["')\]]|\.past_key_values""")
    found = [
        f"{file.name}:{number}: {line.strip()}"
        for file in ENGINE.rglob("*.py")
        if file.name != "names.py"
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if raw.search(line) and "generation_config" not in line and "prefill_chunk_size" not in line
    ]
    assert not found


@pytest.mark.parametrize("family", tiny_models.names())
def test_either_name_of_the_cache_continues_alike(family: str) -> None:
    case = Case(family, "toy_all_layers")
    inputs, new = case.inputs(*SINGLE), torch.tensor([[11]])
    logits = []
    for spelled in (names.spelling("cache"), "past_key_values"):
        with case.prune() as recording:
            cache = names.output_cache(case.forward(inputs))
            logits.append(case.forward({"input_ids": new, spelled: cache}).logits)
        assert recording.run.kv_lengths == [len(recording.run.kept[0]) + 1] * len(case.text_model.layers)
    assert torch.equal(*logits)


def _forward_without(model: Any, name: str) -> type:
    """The decoder layer's class after a release that renamed one argument of its forward."""
    layer = type(model.layers[0])

    def forward(self: Any, hidden_states: Any, *, position_embeddings: Any = None, **kwargs: Any) -> Any:
        return layer.forward(self, hidden_states, position_embeddings=position_embeddings, **kwargs)

    return type(layer.__name__, (layer,), {"forward": forward})


def test_a_forward_without_a_name_is_refused_at_entry(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("llava", "toy_all_layers")
    changed = _forward_without(case.text_model, "attention_mask")
    for layer in case.text_model.layers:
        monkeypatch.setattr(layer, "__class__", changed)
    message = r"LlamaDecoderLayer.forward of transformers \S+ takes no attention_mask, position_ids, cache.*Install"
    with pytest.raises(ValueError, match=message), case.prune():
        pass


def test_a_forward_that_does_not_use_what_it_takes_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are all there, but the model loop's own values are used: what a rename with an alias looks like."""
    case = Case("llava", "toy_all_layers")
    layer, loops = type(case.text_model.layers[0]), {}
    original = layer.forward

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
        own = tuple(part[:, -hidden_states.shape[1] :] for part in loops["embeddings"])
        return original(self, hidden_states, **{**kwargs, "position_embeddings": own})

    monkeypatch.setattr(layer, "forward", forward)
    keep = case.text_model.rotary_emb.register_forward_hook(lambda *call: loops.update(embeddings=call[-1]))
    try:
        with (
            pytest.raises(ValueError, match=r"do not work on LlamaModel of transformers .* is off by \d+%.*Install"),
            case.prune(),
        ):
            pass
    finally:
        keep.remove()


@pytest.mark.parametrize("family", tiny_models.names())
def test_the_self_test_is_cheap_and_leaves_no_trace(fresh: None, family: str) -> None:
    case = Case(family, "toy_all_layers")
    seen: list[nn.Module] = []
    handles = [
        m.register_forward_hook(lambda m, *_: seen.append(m)) for m in (case.text_model, *case.text_model.layers)
    ]
    adapter = registry.adapter(family)
    try:
        selftest.self_test(case.model, adapter, family)
        assert len(selftest._passed) == 1
        start = time.perf_counter()
        for _ in range(20):
            selftest.self_test(case.model, adapter, family)
        assert (time.perf_counter() - start) / 20 < 0.003
    finally:
        for handle in handles:
            handle.remove()
    assert not seen, "hooks of other code (a clock) ran for the self-test"


def test_decoding_that_no_hook_saw_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with transformers 5.24 before its names were known: the next token meets a cache that pruning never made."""
    case = Case("llava", "toy_all_layers")
    inputs = case.inputs(*SINGLE)
    plain = names.output_cache(case.forward(inputs))
    block = case.prune()
    block.__enter__()
    case.forward(inputs)
    case.forward({"input_ids": torch.tensor([[11]]), names.spelling("cache"): plain})
    with pytest.warns(UserWarning, match="decoding steps followed a pruned prompt"):
        block.__exit__(None, None, None)


def test_decoding_that_no_hook_saw_is_said_also_beside_one_that_was_seen() -> None:
    case = Case("llava", "toy_all_layers")
    inputs = case.inputs(*SINGLE)
    plain = names.output_cache(case.forward(inputs))
    block = case.prune()
    block.__enter__()
    case.generate(inputs, 3)
    case.forward(inputs)
    case.forward({"input_ids": torch.tensor([[11]]), names.spelling("cache"): plain})
    with pytest.warns(UserWarning, match="1 decoding steps followed a pruned prompt"):
        block.__exit__(None, None, None)


def test_a_cache_that_the_layers_do_not_get_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("llava", "toy_all_layers")
    with case.prune():
        pass  # the self-test ran
    monkeypatch.setitem(names.SPELLINGS, "cache", ("kv",))
    monkeypatch.setattr(names, "output_cache", lambda output: output.past_key_values)
    monkeypatch.setattr("ivcp_eval.engine.hooks.output_cache", lambda output: output.past_key_values)
    monkeypatch.setattr("ivcp_eval.engine.hooks.check_names", lambda *_: None)
    monkeypatch.setattr("ivcp_eval.engine.hooks.selftest.check_names", lambda *_: None)
    with pytest.raises(ValueError, match="did not reach the decoder layers by a name that pruning knows"), case.prune():
        case.forward(case.inputs(*SINGLE))
