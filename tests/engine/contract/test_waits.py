"""How often pruning makes the host wait for the device, beyond what the unpruned model does.

On a CPU the device is pretended (`pretended`); with ``--device cuda`` torch itself says where it waited.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations import sdpa_attention

import ivcp_eval
from ivcp_eval.interface import Unsupported, registry
from ivcp_eval.interface.ops import filled_up, to_device, to_host
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


@contextmanager
def counted() -> Iterator[Any]:
    """``total()`` says how often the host has waited in the block."""
    if WHERE.device == "cpu":
        with pretended.pretended() as waits:
            yield lambda: waits.total
        return
    with warnings.catch_warnings(record=True) as heard, torch.no_grad():
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lambda: sum("synchronizing CUDA operation" in str(warning.message) for warning in heard)
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
    with counted() as total, ivcp_eval.prune(model, method, 0.5) if method else nullcontext():
        # Registered last, so that it runs behind the engine's own hook.
        handle = tiny_models.text_model(family, model).register_forward_hook(lambda *_: ends.append(total()))
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


@pytest.mark.skipif(not hasattr(sdpa_attention, "pack_gqa"), reason="under transformers 5.14 decoding adds waits")
@pytest.mark.parametrize("method", ["ivc_prune", "pyramiddrop", "snapkv"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_waits_are_the_same_of_every_depth_and_batch(family: str, method: str) -> None:
    if WHERE.device == "cpu":
        found = {added(family, method, layouts, depth) for layouts, depth in ((ONE, 1), (FOUR, 1), (FOUR, 2))}
        assert found == {(bound(family, method), 0)}
    else:
        assert added(family, method, FOUR) <= (bound(family, method), 0)


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
    "expanded": lambda x: x.repeat_interleave(2, dim=0),
}


@pytest.mark.parametrize(("operation", "expected"), [*((r, 1) for r in READS), *((q, 0) for q in QUIET)])
def test_what_counts_as_a_wait(operation: str, expected: int) -> None:
    numbers = torch.arange(12.0).view(3, 4)
    run = (READS if expected else QUIET)[operation]
    with counted() as total:
        states = pretended.on_device(numbers) if WHERE.device == "cpu" else numbers.to(WHERE.device)
        before = total()
        run(states)
        assert (total() - before > 0) == bool(expected)
        assert total() - before == expected or WHERE.device != "cpu"


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
