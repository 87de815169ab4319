"""Random signals of one row, and what an oracle needs to know of a tiny model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import ivcp_eval
from ivcp_eval.engine.signals.source import images_at_cut
from ivcp_eval.interface import BudgetOf, Cut, Frame, Image, ImageSpan, Selection, Signals, Step
from ivcp_eval.interface.ops import budget
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models

HEADS, GROUPS, SIZE, HIDDEN = 4, 2, 8, 12


def random_signals(
    *grids: tuple[int, int], ratio: float = 0.5, seed: int = 0, stage: int = 0, lead: int = 3, question: int = 5
) -> Signals:
    """A row of ``lead`` text tokens, the images one after the other (row-major grids), and the question."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sizes = [rows * columns for rows, columns in grids]
    n = lead + sum(sizes) + question
    visual = torch.arange(lead, lead + sum(sizes))
    text = torch.cat((torch.arange(lead), torch.arange(lead + sum(sizes), n)))
    images, start = [], 0
    for grid, size in zip(grids, sizes, strict=True):
        tokens = torch.arange(start, start + size)
        images.append(Image(tokens, budget(ratio, size), size, ImageSpan(tokens + lead, grid=grid)))
        start += size
    maps = {entering: draw(HEADS, n, n).softmax(dim=-1) for entering in (False, True)}
    angles = draw(1, n, SIZE)
    axes = torch.cat((angles, angles.flip(1), angles.roll(1, 2)))  # M-RoPE: no axis says what another does
    tower = {name: draw(sum(sizes)).abs() for name in ("received", "middle/received", "early/received", "joint_cls")}
    tower["group"] = torch.arange(sum(sizes)).div(1 / ratio).floor()
    tower |= {"key": draw(sum(sizes), SIZE), "feature": draw(sum(sizes), 6), "joint_key": draw(sum(sizes), 2 * SIZE)}
    layer = {"query": draw(HEADS, n, SIZE), "key": draw(GROUPS, n, SIZE)}
    hidden = draw(n, HIDDEN)
    row = Signals(
        images=tuple(images),
        visual=visual,
        text=text,
        question=text[lead:],
        hidden=hidden,
        rope=lambda: (axes.cos(), axes.sin()),
        attention=lambda rows, entering=False: maps[entering][:, rows],
        rotate=lambda states: states * angles[0].cos() + states.flip(-1) * angles[0].sin(),
        value=draw(GROUPS, n, SIZE),
        key=draw(GROUPS, n, SIZE),
        query=draw(HEADS, n, SIZE),
        project=lambda signal: layer[signal],
        normed=lambda: hidden / hidden.norm(dim=-1, keepdim=True),
        vision=tower,
        columns=visual,
        cut=Cut(0, ratio),
        ids=torch.arange(n),
        stage=stage,
        family="qwen2_5_vl",
        generator=torch.Generator().manual_seed(seed),
    )
    tower["query"] = draw(sum(sizes), HEADS, SIZE)
    tower["luma"] = draw(sum(sizes), 2, 4).sigmoid()
    return row


def random_clips(
    *clips: tuple[int, int, int], ratio: float = 0.5, budget_of: BudgetOf = "clip", **options: Any
) -> Signals:
    """`random_signals` of videos, each (frames, rows, columns); one of 0 frames is a picture."""
    grids = [(rows, columns) for frames, rows, columns in clips for _ in range(max(1, frames))]
    signals = random_signals(*grids, ratio=ratio, **options)
    shown: list[Frame | None] = []
    for clip, (frames, *_) in enumerate(clips):
        shown += [Frame(clip, index, float(index)) for index in range(frames)] or [None]
    spans = [replace(image.span, frame=frame) for image, frame in zip(signals.images, shown, strict=True)]
    images = images_at_cut(spans, signals.visual, ratio, budget_of)
    return replace(signals, images=images, cut=Cut(0, ratio, budget=budget_of))


def random_steps(n_layers: int, n_steps: int, n_visual: int, ratio: float, memory: dict[str, Any]) -> Iterator[Step]:
    """What a method that masks single steps is asked, layer after layer and step after step, of one row."""
    generator = torch.Generator().manual_seed(0)
    token = torch.arange(n_visual)
    text_key = torch.randn(GROUPS, 4, SIZE, generator=torch.Generator().manual_seed(1))
    for number, layer in itertools.product(range(n_steps), range(n_layers)):
        states = [2 * torch.randn(heads, n, SIZE, generator=generator) for heads, n in ((HEADS, 1), (GROUPS, n_visual))]
        query, key = states if layer else (None, None)
        seen, text = (token, lambda: text_key) if layer else (None, None)
        yield Step(layer, number, token, ratio, query, key, seen, SIZE**-0.5, n_layers, memory, text)


def slow_attention(step: Step, tokens: list[int], beside_text: bool = False) -> list[list[float]]:
    """Per head the softmax over ``tokens`` (and text) of the layer before, for its newest query; of these tokens."""
    assert step.query is not None
    assert step.key is not None
    rows = []
    for head in range(HEADS):
        query, key = step.query[head, -1].double(), step.key[head * GROUPS // HEADS].double()
        powers = [math.exp(float(query @ key[token]) / SIZE**0.5) for token in tokens]
        others: list[float] = []
        if beside_text:
            assert step.other_keys is not None
            text = step.other_keys()[head * GROUPS // HEADS].double()
            others = [math.exp(float(query @ row) / SIZE**0.5) for row in text]
        rows.append([power / sum(powers + others) for power in powers])
    return rows


def best(scores: list[float], k: int) -> list[int]:
    """Indices of the k largest, increasing; ties to the lower index."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def pruned_columns(
    method: str, family: str, inputs: dict[str, Any], ratio: float, **parameters: Any
) -> list[list[int]]:
    """Per row the prompt columns that survive a prefill of the family's tiny model."""
    model, _ = tiny_models.build(family)
    with ivcp_eval.prune(model, method, ratio, **parameters) as run, torch.no_grad():
        model(**inputs)
    return [columns.tolist() for columns in run.kept]


def evicting_columns(
    method: str, family: str, inputs: dict[str, Any], ratio: float, **parameters: Any
) -> list[list[list[int]]]:
    """Per layer and key head the prompt columns of visual tokens that the caches of a single row keep."""
    model, _ = tiny_models.build(family)
    visual, made = image_columns(family, inputs), make_method(method, parameters)
    select = made.select
    kept: list[list[list[int]]] = []

    def recording(signals: Signals) -> Selection:
        selection = select(signals)
        kept.append([[visual[i] for i in head] for head in torch.atleast_2d(selection.keep).tolist()])
        return selection

    object.__setattr__(made, "select", recording)  # the instance is a frozen dataclass
    with ivcp_eval.prune(model, made, ratio), torch.no_grad():
        model(**inputs)
    return kept


def image_columns(family: str, inputs: dict[str, Any], row: int = 0) -> list[int]:
    """The prompt columns of a row's visual tokens."""
    token = tiny_models.family(family).IMAGE
    return [column for column, value in enumerate(inputs["input_ids"][row].tolist()) if value == token]


def stock_attention(family: str, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Every layer's attention map of the unpruned eager model, as transformers itself returns it."""
    model, _ = tiny_models.build(family, attn="eager")
    with torch.no_grad():
        return tuple(model(**inputs, output_attentions=True).attentions)
