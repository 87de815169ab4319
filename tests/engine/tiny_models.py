"""Tiny models with random weights, one builder per family, and prompts for them as tensors (no tokenizer).

>>> model, make_inputs = build("qwen2_5_vl", seed=0, attn="sdpa")
>>> inputs = make_inputs("t5 i0 t9", "t4 i1 t3 i2 t6", "t12")  # three rows, left-padded, the last one text only
>>> model.generate(**inputs, max_new_tokens=4, do_sample=False)  # doctest: +SKIP

A layout names segments in order: ``tN`` is N text tokens, ``iK`` the family's image of kind K, ``vK`` its video of kind
K. A family lives in
``tests/model_adapters/families/<family>.py`` (its adapter's name) and defines

* ``N_TOKENS``: visual tokens of each kind of image, kind 0 the largest and of at least 12; have a kind with one
  token if the family can. A layout's K is taken modulo their number.
* ``model(attn) -> nn.Module``: a stock class with at least 6 small decoder layers, float32, for that attention
  implementation. Weights are drawn here.
* ``IMAGE``: the id of the image placeholder token.
* where the family has videos, ``STEPS``: visual tokens of each grid step of each kind of video, and ``VIDEO``: the id
  of the placeholder token.
* ``inputs(rows, seed) -> dict``: what ``forward`` and ``generate`` take, for rows of ("text", N), ("image", K) and
  ("video", K) segments: at least ``input_ids`` and ``attention_mask``, left-padded (`pad_left`), and image tensors if
  there are any.
* optionally ``SECOND_TURN_DROPS``: inputs not to be passed again on a filled cache.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ivcp_eval.interface import registry

Segment = tuple[str, int]
Rows = list[list[Segment]]

PAD = 0
TEXT_IDS = (10, 400)  # ordinary token ids drawn for text: low inclusive, high exclusive
VOCABULARY = 512


def names() -> tuple[str, ...]:
    """Families that have a tiny model."""
    return tuple(
        sorted(
            p.stem for p in (Path(__file__).parents[1] / "model_adapters" / "families").glob("*.py") if p.stem[0] != "_"
        )
    )


def family(name: str) -> ModuleType:
    """The builder module of a family."""
    return import_module(f"tests.model_adapters.families.{name}")


def build(name: str, seed: int = 0, attn: str = "sdpa") -> tuple[nn.Module, Callable[..., dict[str, Any]]]:
    """The tiny model of a family (shared between tests: leave it as it was) and its prompt builder."""
    return _model(name, seed, attn), functools.partial(make_inputs, name)


@dataclass
class Where:
    """Device, precision and attention of the models of this test run: options of the command line."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"


WHERE = Where()


@functools.cache
def _model(name: str, seed: int, attn: str) -> nn.Module:
    model = family(name).model(attn)
    initialise(model, seed)
    for parameter in model.parameters():  # buffers (rotary frequencies) stay float32, as loading a checkpoint does
        parameter.data = parameter.data.to(WHERE.dtype)
    model.to(WHERE.device)
    model.eval().requires_grad_(False)
    # No early stop: every test decodes exactly as many tokens as it asks for.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    # A random model would emit placeholders; only ordinary text is ever generated.
    model.generation_config.suppress_tokens = [*range(TEXT_IDS[0]), *range(TEXT_IDS[1], VOCABULARY)]
    return model


@functools.lru_cache(maxsize=2)
def half(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A copy of the tiny model in half precision; buffers (rotary frequencies) stay float32, as loading does."""
    model = copy.deepcopy(_model(name, 0, attn))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def text_model(name: str, model: nn.Module) -> Any:
    """The decoder of any instance of the family."""
    return registry.adapter(name).text_model(model)


def make_inputs(name: str, *layouts: str, seed: int = 0) -> dict[str, Any]:
    """Inputs of one row per layout. Row r's content depends on (seed, its layout), not on the other rows."""
    inputs = family(name).inputs([parse(layout) for layout in layouts], seed)
    return {key: value.to(WHERE.device) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def parse(layout: str) -> list[Segment]:
    """``"t5 i0"`` -> ``[("text", 5), ("image", 0)]``."""
    return [({"t": "text", "i": "image", "v": "video"}[part[0]], int(part[1:])) for part in layout.split()]


def row_generator(row: list[Segment], seed: int) -> torch.Generator:
    """The source of a row's content: equal rows are equal in every batch."""
    code = seed
    for kind, number in row:
        code = (code * 1009 + number * 2 + {"image": 0, "text": 1, "video": 500}[kind]) % (1 << 31)
    return torch.Generator().manual_seed(code)


def draw_text(generator: torch.Generator, n: int) -> list[int]:
    """``n`` ordinary token ids."""
    return torch.randint(*TEXT_IDS, (n,), generator=generator).tolist()


def pad_left(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(B, S) ids and (B, S) attention mask, int64."""
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def initialise(model: nn.Module, seed: int) -> None:
    """Random weights that make attention matter: logits of scale 1 to 10, so that an error is seen in them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            scale, centre = 0.1, 1.0 if "norm" in name and name.endswith("weight") else 0.0
        elif "embed" in name:
            scale, centre = 1.0, 0.0
        else:
            scale, centre = 1.5 / parameter[0].numel() ** 0.5, 0.0
        parameter.data.copy_(noise * scale + centre)


def second_turn(name: str, inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """Inputs of a longer conversation ``ids`` (B, S') on a cache that holds its images already."""
    drops = getattr(family(name), "SECOND_TURN_DROPS", ("pixel_values",))
    return extend({key: value for key, value in inputs.items() if key not in drops}, ids)


def extend(inputs: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The same inputs with text appended: ``ids`` (B, S') begins with ``inputs["input_ids"]``."""
    prompt = inputs["input_ids"]
    more = ids.shape[1] - prompt.shape[1]
    extended: dict[str, Any] = {}
    for key, value in inputs.items():
        per_token = isinstance(value, Tensor) and value.shape == prompt.shape
        extended[key] = nn.functional.pad(value, (0, more), value=int(key == "attention_mask")) if per_token else value
    extended["input_ids"] = ids
    return extended
