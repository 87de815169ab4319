"""A model spread over two devices, as ``device_map="auto"`` places it: accelerate's hooks between pretended devices."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook

import ivcp_eval
from ivcp_eval.engine.fork import fork
from ivcp_eval.interface.variants import Variant
from tests.engine import tiny_models
from tests.engine.contract import pretended
from tests.engine.tiny_models import WHERE  # noqa: F401  # of the condition

#: A cut before, at and behind the border between the devices (layer 3); several; evictions; what listens to the tower,
#: edits the cache, masks steps or layers.
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "ivc_prune": {"layer": 2},
    "ivc_prune at the border": {"layer": 3},
    "ivc_prune behind it": {"layer": 4},
    "pyramiddrop": {},
    "snapkv": {},
    "visionzip": {},
    "rotatek": {},
    "fastocr": {},
    "adaspark": {"cube": (1, 2, 2)},
}
PROMPTS = ("t5 i0 t9", "t4 i1 t3 i2 t6", "t12")
pytestmark = pytest.mark.skipif("WHERE.device != 'cpu'", reason="pretended devices beside real ones")


def place(name: str, border: int = 3) -> int:
    """The device of a module of LLaVA: the last layers, the norm and the head are on the second."""
    layer = re.search(r"language_model\.layers\.(\d+)", name)
    return int(int(layer[1]) >= border if layer else name.endswith(("language_model.norm", "lm_head")))


@functools.cache
def spread() -> Any:
    """The tiny LLaVA over two devices."""
    model = pretended.model_on_device(tiny_models.build("llava")[0], place)
    for name, module in model.named_modules():
        if re.search(r"language_model\.(layers\.\d+|norm|embed_tokens)$|lm_head$", name):
            device = torch.device("cuda", place(name))
            add_hook_to_module(module, AlignDevicesHook(device))
            attach_execution_device_hook(module, device)
    add_hook_to_module(model, AlignDevicesHook(torch.device("cuda", 0), io_same_device=True), append=True)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_two_devices_answer_as_one(name: str) -> None:
    method, parameters, whole = name.partition(" ")[0], METHODS[name], tiny_models.build("llava")[0]
    ratio = 1.0 if method == "none" else 0.5
    inputs = tiny_models.make_inputs("llava", *PROMPTS)
    with ivcp_eval.prune(whole, method, ratio, **parameters) as expected:
        wanted = whole.generate(**inputs, max_new_tokens=4, do_sample=False)
    with pretended.pretended():
        model = spread()
        with ivcp_eval.prune(model, method, ratio, **parameters) as run:
            got = model.generate(
                **pretended.on_device(inputs), max_new_tokens=4, do_sample=False, return_dict_in_generate=True
            )
        assert got.sequences.tolist() == wanted.tolist()
        assert [layer.keys.device.index for layer in got.past_key_values.layers] == [0, 0, 0, 1, 1, 1]
    assert (run.kv_lengths, run.visual_kept) == (expected.kv_lengths, expected.visual_kept)


def test_a_fork_over_two_devices() -> None:
    whole: Any = tiny_models.build("llava")[0]
    variants = [
        Variant(""),
        *(Variant("", name.partition(" ")[0], 0.5, parameters) for name, parameters in list(METHODS.items())[1:7]),
    ]
    inputs = tiny_models.make_inputs("llava", *PROMPTS)
    wanted = fork(whole, variants, inputs, max_new_tokens=3, at_once=3)
    with pretended.pretended():
        got = fork(spread(), variants, pretended.on_device(inputs), max_new_tokens=3, at_once=3)
    for ours, theirs in zip(got, wanted, strict=True):
        assert [row.tolist() for row in ours.tokens] == [row.tolist() for row in theirs.tokens]
        assert ours.run.visual_cached == theirs.run.visual_cached


def test_tensors_of_two_devices_do_not_mix() -> None:
    with pretended.pretended(), pytest.raises(RuntimeError, match="on the devices"):
        pretended.Pretended(torch.ones(3)) + pretended.Pretended(torch.ones(3), 1)
