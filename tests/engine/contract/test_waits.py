"""How often pruning makes the host wait for the device, beyond what the unpruned model does.

On a CPU the device is pretended (`pretended`); with ``--device cuda`` torch itself says where it waited.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers.integrations import sdpa_attention

import ivcp_eval
from ivcp_eval.engine.fork import fork
from ivcp_eval.interface import Unsupported, registry
from ivcp_eval.interface.ops import filled_up, to_device, to_host
from ivcp_eval.interface.variants import Variant
from tests.engine import tiny_models
from tests.engine.contract import pretended
from tests.engine.contract.cases import Case
from tests.engine.tiny_models import WHERE

ONE = ("t5 i0 t9",)
FOUR = ("t5 i0 t9", "t4 i1 t3 i2 t6", "t4 i1 i0 t3 i2 t8", "t6 i1 t7")
#: What the engine reads of a prefill: once the prompt (masks, ids, sizes of images), and once for each cut, at which
#: the rows' new lengths must be known; of all evictions together once, when the last layer has run.
PROMPT, CUT = 1, 1
on_a_cpu = pytest.mark.skipif("WHERE.device != 'cpu'", reason="a pretended device beside a real one")


@dataclass(frozen=True)
class Counted:
    """How often the host has waited in a block so far; ``own``: for the project's code, where that can be told."""

    total: Callable[[], int]
    own: Callable[[], int | None] = lambda: None


@contextmanager
def counted() -> Iterator[Counted]:
    """Count in the block."""
    if WHERE.device == "cpu":
        with pretended.pretended() as waits:
            yield Counted(lambda: waits.total, waits.own.total)
        return
    with warnings.catch_warnings(record=True) as heard, torch.no_grad():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield Counted(lambda: sum("synchronizing CUDA operation" in str(warning.message) for warning in heard))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@functools.cache
def on_device(family: str, depth: int) -> nn.Module:
    """The tiny model with its decoder layers ``depth`` times over, on the device."""
    model = copy.deepcopy(tiny_models.build(family)[0])
    decoder = tiny_models.text_model(family, model)
    layers = list(decoder.layers)
    for number in range(len(layers), depth * len(layers)):
        decoder.layers.append(copy.deepcopy(layers[number % len(layers)]))
        decoder.layers[-1].self_attn.layer_idx = number
    config = decoder.config
    config.num_hidden_layers = model.config.get_text_config().num_hidden_layers = len(decoder.layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * len(decoder.layers)
    return pretended.model_on_device(model) if WHERE.device == "cpu" else model


@functools.cache
def waits(family: str, method: str, layouts: tuple[str, ...], depth: int = 1) -> tuple[int, int]:
    """In the prefill and in the first decode step; ``method`` empty: unpruned."""
    model: Any = on_device(family, depth)
    inputs = tiny_models.make_inputs(family, *layouts)
    inputs = pretended.on_device(inputs) if WHERE.device == "cpu" else inputs
    # What is done once per class of models, not per prompt.
    with ivcp_eval.prune(tiny_models.build(family)[0], "random", 0.5):
        pass
    ends: list[int] = []
    with counted() as waited, ivcp_eval.prune(model, method, 0.5) if method else nullcontext():
        # Registered last, so that it runs behind the engine's own hook.
        handle = tiny_models.text_model(family, model).register_forward_hook(lambda *_: ends.append(waited.total()))
        try:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        finally:
            handle.remove()
    return ends[0], ends[1] - ends[0]


def added(family: str, method: str, layouts: tuple[str, ...], depth: int = 1) -> tuple[int, int]:
    """By pruning."""
    pruned, unpruned = waits(family, method, layouts, depth), waits(family, "", layouts, depth)
    return pruned[0] - unpruned[0], pruned[1] - unpruned[1]


#: Methods that read from the device while they choose, for every image or clip, and why. No other may.
WAITING = {
    "tokens are taken one after the other, rounds of which are compared on the host": (
        *("cdpruner", "cdpruner_openvino", "divprune", "geo3dpruner", "idpruner", "otprune", "scope", "sppruner"),
    ),
    "how many tokens a rule takes is known on the device only": (
        *(
            "adaspark",
            "coast",
            "dart",
            "dart_tensorrt",
            "desap",
            "dualcomp",
            "holov",
            "iwp",
            "topv",
            "uniform_time",
            "vlcache",
        ),
    ),
    "clusters, and the sparse weights by which tokens merge": (
        *("lookm", "lrcp", "pool", "pool_time", "prumerge", "prumerge_plus", "quadtree", "sparsevlm", "visionzip"),
        *("tome", "tome_post", "vscan"),
    ),
    "clips are split into frames and stretches on the host": (
        *("aot", "codecsight", "dycoke", "evs", "fastvid", "fewer_frames", "forestprune", "framefusion", "holitom"),
        *("omnirefine", "prunevid", "vidcom2", "videorouter"),
    ),
    "keys of every layer are edited row by row": ("rotatek", "think"),
}
#: Methods that are asked before every layer of every decode step: what they mask is counted on the host.
STEPPING = ("dycoke", "fastocr")


def bound(family: str, method: str) -> int:
    """Waits of a prefill under a method that reads nothing itself."""
    case = Case(family, method)
    cuts = registry.make_method(method).cuts(registry.adapter(family).facts(case.model.config, family), 0.5)
    return PROMPT + CUT * sum(not cut.evicts for cut in cuts) + any(cut.evicts for cut in cuts)


@pytest.mark.parametrize("method", registry.method_names())
def test_waits_do_not_grow_with_the_batch(method: str) -> None:
    try:
        prefill, step = added("llava", method, FOUR)
    except Unsupported as reason:
        pytest.skip(str(reason))
    assert (step > 0) == (method in STEPPING)
    waiting = any(method in names for names in WAITING.values())
    assert waiting or prefill <= bound("llava", method)
    assert not waiting or prefill > bound("llava", method) or WHERE.device != "cpu", "it no longer waits: strike it out"


#: In the first step after a prompt whose rows are equally long, earlier releases pass on the caller's mask of ones,
#: where newer ones pass on none: the engine asks once, for all layers, whether it admits everything.
FIRST_STEP = 0 if hasattr(sdpa_attention, "pack_gqa") else 1


@pytest.mark.parametrize("method", ["ivc_prune", "pyramiddrop", "snapkv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_waits_are_the_same_of_every_depth_and_batch(family: str, method: str) -> None:
    prefill = bound(family, method)
    if WHERE.device == "cpu":
        found = [added(family, method, layouts, depth) for layouts, depth in ((ONE, 1), (ONE, 2), (FOUR, 1), (FOUR, 2))]
        assert found == [(prefill, FIRST_STEP), (prefill, FIRST_STEP), (prefill, 0), (prefill, 0)]
    else:
        for layouts, step in ((ONE, FIRST_STEP), (FOUR, 0)):
            read, decoded = added(family, method, layouts)
            assert read <= prefill
            assert decoded <= step


RATIOS = (1.0, 0.9, 0.75, 0.5, 0.35, 0.25, 0.1)
SEVEN = tuple(Variant("", "ivc_prune", ratio, {"layer": 3}) for ratio in RATIOS)
MIXED = (Variant(""), Variant("", "fastv", 0.5), Variant("", "pyramiddrop", 0.5), *SEVEN[3:5])
#: Of a fork: its prompt once, what all methods choose at their first cuts once, and the tokens when all are decoded.
SHARED, TOKENS = 1, 1


def fork_waits(family: str, variants: tuple[Variant, ...], layouts: tuple[str, ...], depth: int, new: int) -> Any:
    """(all, those of the project's own code); the latter is None on a GPU, which does not say whose they are."""
    model: Any = on_device(family, depth)
    inputs = tiny_models.make_inputs(family, *layouts)
    inputs = pretended.on_device(inputs) if WHERE.device == "cpu" else inputs
    with ivcp_eval.prune(tiny_models.build(family)[0], "random", 0.5):
        pass
    with counted() as waited, patch.object(torch.cuda, "empty_cache", side_effect=AssertionError("waits for all work")):
        fork(model, variants, inputs, at_once=len(variants), max_new_tokens=new)
        return waited.total(), waited.own()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_fork_waits_as_often_for_one_variant_as_for_seven(family: str) -> None:
    for layouts, depth in ((ONE, 1), (FOUR, 1), (FOUR, 2)):
        few, own = fork_waits(family, SEVEN[2:4], layouts, depth, 2)
        assert own in (PROMPT + SHARED + TOKENS, None)
        many, own_of_many = fork_waits(family, SEVEN[1:], layouts, depth, 2)
        assert many <= few
        assert own_of_many == own
        # The later cuts of one variant are its own.
        more, own = fork_waits(family, MIXED, layouts, depth, 2)
        assert own in (PROMPT + SHARED + 2 * CUT + TOKENS, None)
        # And a step of decoding waits for nothing but what a step of stock code does.
        assert fork_waits(family, MIXED, layouts, depth, 3)[0] - more == _step(family, layouts, depth)


def _step(family: str, layouts: tuple[str, ...], depth: int) -> int:
    """Waits of one step of the unpruned model's decoding."""
    totals = []
    for new in (2, 3):
        model: Any = on_device(family, depth)
        inputs = tiny_models.make_inputs(family, *layouts)
        inputs = pretended.on_device(inputs) if WHERE.device == "cpu" else inputs
        with counted() as waited:
            model.generate(**inputs, max_new_tokens=new, do_sample=False)
            totals.append(waited.total())
    return totals[1] - totals[0]


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_what_a_step_hides_of_a_pruned_prompt_stays_hidden(family: str) -> None:
    """Stock code does not look at the first columns of the mask, of which a pruned cache has lost as many."""
    given: list[Any] = []
    for attention in ("sdpa", "eager"):  # of which the latter is masked always
        case = Case(family, "ivc_prune", attn=attention)
        inputs = case.inputs("t5 i0 t9")
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        hiding = mask.clone()
        hiding[:, 1:3] = 0  # text before the image
        for own in (mask, hiding):
            with case.prune():
                cache = case.forward(inputs, use_cache=True).past_key_values
                token = torch.full_like(inputs["input_ids"][:, :1], 20)
                given.append(case.forward({"input_ids": token, "attention_mask": own}, past_key_values=cache).logits)
    seen, hidden, eager_seen, eager_hidden = given
    assert (seen - hidden).abs().max() > 0.01
    torch.testing.assert_close(seen, eager_seen, atol=1e-4, rtol=0)
    torch.testing.assert_close(hidden, eager_hidden, atol=1e-4, rtol=0)


@on_a_cpu
def test_the_pretended_device_computes_what_the_cpu_does() -> None:
    inputs = tiny_models.make_inputs("llava", *FOUR)
    model: Any = tiny_models.build("llava")[0]
    wanted = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with ivcp_eval.prune(model, "ivc_prune", 0.5) as run:
        pruned = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    there: Any = pretended.model_on_device(model)
    with pretended.pretended():
        given = pretended.on_device(inputs)
        assert there.generate(**given, max_new_tokens=3, do_sample=False).tolist() == wanted.tolist()
        with ivcp_eval.prune(there, "ivc_prune", 0.5) as again:
            assert there.generate(**given, max_new_tokens=3, do_sample=False).tolist() == pruned.tolist()
    assert [kept.tolist() for kept in again.kept] == [kept.tolist() for kept in run.kept]


READS = {
    "item": lambda x: x[0, 0].item(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "nonzero": lambda x: (x > 3).nonzero(),
    "boolean index": lambda x: x[x > 3],
    "masked_select": lambda x: x.masked_select(x > 3),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.flatten().long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x[:, 0].long(), dim=0),
    "sent": lambda x: torch.arange(3).to(x.device),
    "made": lambda x: torch.tensor([1, 2], device=x.device),
    "listed": lambda x: x[[0, 2]],
    "several": lambda x: to_host([x, x > 3, x.long()]),
}
QUIET = {
    "sent": lambda x: to_device(torch.arange(3), x.device),
    "filled": lambda x: x.clone().__setitem__(x > 3, 0.0),
    "gathered": lambda x: x[x[:, 0].long().clamp(0, 2)],
    "ranked": lambda x: filled_up(x[0], x[0] > 1, 3),
    "made": lambda x: torch.zeros(3, device=x.device) + x.new_ones(3),
    "nothing": lambda x: torch.tensor([], device=x.device),
    "expanded": lambda x: x.repeat_interleave(2, dim=0),
}


@pytest.mark.parametrize(("operation", "expected"), [*((r, 1) for r in READS), *((q, 0) for q in QUIET)])
def test_what_counts_as_a_wait(operation: str, expected: int) -> None:
    numbers = torch.arange(12.0).view(3, 4)
    run = (READS if expected else QUIET)[operation]
    with counted() as waited:
        states = pretended.on_device(numbers) if WHERE.device == "cpu" else numbers.to(WHERE.device)
        before = waited.total()
        run(states)
        assert (waited.total() - before > 0) == bool(expected)
        assert waited.total() - before == expected or WHERE.device != "cpu"


@on_a_cpu
def test_tensors_of_both_places_do_not_mix() -> None:
    with pretended.pretended(), pytest.raises(RuntimeError, match="on the host"):
        pretended.on_device(torch.ones(3)) + torch.ones(3)


@on_a_cpu
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_to_host_gives_equal_copies(dtype: torch.dtype) -> None:
    numbers = [torch.arange(5).to(dtype), torch.tensor([[True, False, True]]), torch.tensor(7), torch.empty(0, 2)]
    with pretended.pretended() as waits:
        found = to_host([*pretended.on_device(numbers), torch.arange(2)])
        assert waits.total == 1
    for tensor, wanted in zip(found, [*numbers, torch.arange(2)], strict=True):
        assert type(tensor) is torch.Tensor
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)
