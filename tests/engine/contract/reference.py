"""A slow, independent reference of a pruned run: nothing is removed, forbidden columns are masked.

Every forward sees the whole sequence, prompt and generated tokens, without a cache. At each decoder layer a 4-D mask
forbids the columns that the pruned run has dropped there. Nothing of ``ivcp_eval.engine`` is used.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ivcp_eval.interface import Cut, Processed, Selection, Step


@dataclass
class Stage:
    """One cut as it was made: per row the surviving columns, and how survivors were merged."""

    cut: Cut
    alive: list[list[int]]
    merges: list[tuple[list[int], list[int], Tensor] | None]  # columns merged from, columns merged into, weights


@dataclass
class Plan:
    """What a pruned prefill dropped, in prompt columns."""

    prompt: int  # S
    valid: list[list[int]]  # columns that are no padding
    stages: list[Stage]
    edits: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (layer, row) -> keys of its visual columns
    visual: list[list[int]] = field(default_factory=list)
    evicted: dict[tuple[int, int], list[set[int]]] = field(default_factory=dict)  # (layer, row) -> per head, what left
    # (layer, row) -> per head the columns merged into, and the weights of all visual columns
    merged: dict[tuple[int, int], list[tuple[list[int], Tensor]]] = field(default_factory=dict)
    embedded: list[Tensor] = field(default_factory=list)  # of rows with images, what a tower that merges made of them

    @property
    def edits_cache(self) -> bool:
        """Whether cached states are others than the prompt left, which no mask can show."""
        return bool(self.edits or self.merged)

    @property
    def kept(self) -> list[list[int]]:
        """Columns alive after the last cut."""
        return self.stages[-1].alive if self.stages else self.valid

    def processed(self, layer: int, row: int) -> set[int]:
        """Prompt columns that a layer computes in the prefill."""
        alive = set(self.valid[row])
        for stage in self.stages:
            if stage.cut.layer <= layer:
                alive &= set(stage.alive[row])
        return alive

    attended: dict[tuple[int, int, int], set[int]] = field(default_factory=dict)  # (layer, row, step) -> what is masked

    def add_steps(self, steps: Sequence[tuple[Step, Tensor | None]]) -> None:
        """What a method masked in each forward after the prefill, layer after layer, row after row."""
        with_images = [row for row, columns in enumerate(self.visual) if columns]
        rows: dict[tuple[int, int], int] = {}
        for step, mask in steps:
            number = rows[step.layer, step.number] = rows.get((step.layer, step.number), -1) + 1
            row = with_images[number]
            masked = [] if mask is None else step.token[~mask.cpu()].tolist()
            self.attended[step.layer, row, step.number] = {self.visual[row][token] for token in masked}
        self.__dict__.pop("_masks", None)

    unseen: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (layer, row) -> (heads, V, V) what is masked
    skipped: dict[tuple[int, int], Processed] = field(default_factory=dict)  # (layer, row) -> what the MLP does

    def add_sparse(self, answers: Sequence[tuple[int, Tensor | Processed | None]]) -> None:
        """What a method left out of each layer of the prefill, row after row."""
        with_images = [row for row, columns in enumerate(self.visual) if columns]
        asked: dict[int, int] = {}
        halves = 2 * len(with_images)
        for layer, answer in answers:
            number = asked[layer] = asked.get(layer, -1) + 1
            row = with_images[number % halves % len(with_images)]
            if isinstance(answer, Processed):
                self.skipped[layer, row] = answer
            elif answer is not None:
                self.unseen[layer, row] = ~answer.reshape(-1, *answer.shape[-2:])

    @property
    def heads(self) -> int:
        """Heads whose caches hold, or whose queries see, different tokens; 1 if it is the same for all."""
        return max(map(len, [*self.evicted.values(), *self.unseen.values()]), default=1)

    def cached(self, layer: int, row: int, head: int = 0) -> set[int]:
        """Prompt columns that a layer's cache holds after the prefill."""
        alive = self.processed(layer, row)
        if (layer, row) in self.evicted:
            left = self.evicted[layer, row]
            return alive - left[head if len(left) > 1 else 0]
        for stage in self.stages:
            if stage.cut.cache == "all_layers" or (stage.cut.cache == "all_but_first" and layer > 0):
                alive &= set(stage.alive[row])
        return alive

    def mask(self, layer: int, length: int) -> Tensor:
        """(B, heads, length, length) bool: may query see key?"""
        past = torch.ones(length, length, dtype=torch.bool).tril()
        rows = []
        for row, head in itertools.product(range(len(self.valid)), range(self.heads)):
            keys = torch.ones(2, length, dtype=torch.bool)  # for prompt queries; for generated ones
            for kind, alive in enumerate((self.processed(layer, row), self.cached(layer, row, head))):
                keys[kind, : self.prompt] = False
                keys[kind, sorted(alive)] = True
            generated = torch.arange(length) >= self.prompt
            # Dropped queries are never looked at, but a row without any key would be NaN.
            seen = past & keys[generated.long()]
            if (layer, row) in self.unseen:
                unseen, columns = self.unseen[layer, row], self.visual[row]
                for number, keys_of in enumerate(unseen[head if len(unseen) > 1 else 0].tolist()):
                    left_out = [columns[i] for i, out in enumerate(keys_of) if out and i != number]
                    seen[columns[number], left_out] = False
            masked: set[int] = set()
            for query in range(self.prompt, length):  # a forward of several tokens is one step
                masked = self.attended.get((layer, row, query - self.prompt), masked)
                seen[query, sorted(masked)] = False
            rows.append(seen | torch.eye(length, dtype=torch.bool))
        return torch.stack(rows).unflatten(0, (-1, self.heads))


def make_plan(
    inputs: dict[str, Any],
    placeholders: Container[int],
    cuts: Sequence[Cut],
    calls: Sequence[tuple[int, Selection]],
    edits: Sequence[tuple[int, Tensor]] = (),
) -> Plan:
    """The plan of one prefill from what the method answered, row after row, stage after stage."""
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    alive = [row.nonzero().flatten().tolist() for row in valid]
    plan = Plan(ids.shape[1], [list(row) for row in alive], [])
    plan.visual = [[c for c in row if int(ids[i, c]) in placeholders] for i, row in enumerate(alive)]
    with_images = [row for row, columns in enumerate(plan.visual) if columns]
    for number, (layer, keys) in enumerate(edits):
        plan.edits[layer, with_images[number % len(with_images)]] = keys
    unread = list(calls)
    for number, cut in enumerate(cuts):
        merges: list[Any] = []
        for row, columns in enumerate(alive):
            visual = [c for c in columns if int(ids[row, c]) in placeholders]
            if not visual:
                merges.append(None)
                continue
            stage, selection = unread.pop(0)
            assert stage == number, "select was called out of order"
            if cut.evicts:
                chosen = torch.atleast_2d(selection.keep).tolist()
                plan.evicted[cut.layer, row] = [set(visual) - {visual[i] for i in keep} for keep in chosen]
                if selection.merge is not None:
                    weights = selection.merge.to_dense().reshape(len(chosen), -1, len(visual))
                    into = [[visual[i] for i in keep] for keep in chosen]
                    plan.merged[cut.layer, row] = list(zip(into, weights, strict=True))
                continue
            survivors = [visual[i] for i in selection.keep.tolist()]
            merges.append(None if selection.merge is None else (visual, survivors, selection.merge))
            alive[row] = [c for c in columns if c not in visual or c in survivors]
        if not cut.evicts:
            plan.stages.append(Stage(cut, [list(row) for row in alive], merges))
    assert not unread, f"select was called {len(unread)} times too often"
    return plan


@contextmanager
def reference(text_model: Any, plan: Plan) -> Iterator[None]:
    """Every cache-less forward inside the block computes what the pruned run should."""
    state: dict[str, Any] = {"positions": None, "embedding": False}
    handles = []

    def before_rotary(_module: Any, args: Any, kwargs: Any) -> None:
        if not state["embedding"]:
            state["positions"] = kwargs["position_ids"] if "position_ids" in kwargs else args[1]

    def before_layer(layer: int, _module: Any, args: Any, kwargs: Any) -> Any:
        assert kwargs.get("past_key_values") is None or kwargs["past_key_values"].get_seq_length(layer) == 0
        hidden, repeats = args[0], args[0].shape[0] // len(plan.valid)
        kwargs = {**kwargs, **_masked(text_model, plan, layer, hidden, 0), "position_ids": None}
        if layer == 0 and plan.embedded:
            hidden = _embedded(hidden, plan, repeats)
        for stage in plan.stages:
            if stage.cut.layer == layer:
                hidden = _merge(hidden, stage, repeats)
            if stage.cut.layer <= layer and stage.cut.renumber:
                positions = _renumbered(state["positions"], plan, stage, hidden, repeats)
                state["embedding"] = True
                kwargs["position_embeddings"] = text_model.rotary_emb(hidden, positions)
                state["embedding"] = False
        return (hidden, *args[1:]), kwargs

    def after_mlp(layer: int, _module: Any, _args: Any, output: Tensor) -> Tensor:
        output, repeats = output.clone(), output.shape[0] // len(plan.valid)
        for row, columns in enumerate(plan.visual):
            done = plan.skipped.get((layer, row))
            for copy, number in itertools.product(range(row * repeats, (row + 1) * repeats), range(len(columns))):
                if done is None or done.token[number]:
                    continue
                alike = [
                    c for c, t, g in zip(columns, done.token, done.group, strict=True) if t and g == done.group[number]
                ]
                output[copy, columns[number]] = output[copy, alike].float().mean(0).to(output.dtype)
        return output

    handles.append(text_model.rotary_emb.register_forward_pre_hook(before_rotary, with_kwargs=True))
    for index, module in enumerate(text_model.layers):
        hook = functools.partial(before_layer, index)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        if plan.skipped:
            handles.append(module.mlp.register_forward_hook(functools.partial(after_mlp, index)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edited_cache(text_model: Any, plan: Plan) -> Iterator[None]:
    """For methods that cut nothing but edit or merge what is cached: the stock model and cache, with that put into it.

    What was evicted stays there, and is forbidden by a mask.
    """
    assert not plan.stages

    def after(_module: Any, _args: Any, output: Any) -> None:
        cache = output.past_key_values
        if cache.get_seq_length() != plan.prompt:
            return
        repeats = cache.layers[0].keys.shape[0] // len(plan.valid)
        for (layer, row), keys in plan.edits.items():
            for copy in range(row * repeats, (row + 1) * repeats):
                cache.layers[layer].keys[copy][:, plan.visual[row]] = keys.to(cache.layers[layer].keys.dtype)
        for (layer, row), heads in plan.merged.items():
            states = (cache.layers[layer].keys, cache.layers[layer].values)
            for copy, (name, head) in itertools.product(
                range(row * repeats, (row + 1) * repeats), itertools.product(states, range(states[0].shape[1]))
            ):
                into, weights = heads[head if len(heads) > 1 else 0]
                own = name[copy, head]
                own[into] = (weights @ own[plan.visual[row]].float()).to(own.dtype)

    def before_layer(layer: int, _module: Any, args: Any, kwargs: Any) -> Any:
        past = kwargs["past_key_values"].get_seq_length(layer)
        return (args, kwargs | _masked(text_model, plan, layer, args[0], past)) if past else None

    handles = [text_model.register_forward_hook(after)]
    for index, module in enumerate(text_model.layers if plan.evicted else ()):
        hook = functools.partial(before_layer, index)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masked(text_model: Any, plan: Plan, layer: int, hidden: Tensor, past: int) -> dict[str, Any]:
    """The mask of a layer for the columns behind ``past``, as its argument."""
    mask = _mask(plan, layer, past + hidden.shape[1])[:, :, past:]
    mask = mask.repeat_interleave(hidden.shape[0] // len(plan.valid), 0)
    if plan.heads > 1:
        mask = mask.repeat_interleave(text_model.config.num_attention_heads // plan.heads, 1)
    additive = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    return {"attention_mask": additive}


def _mask(plan: Plan, layer: int, length: int) -> Tensor:
    cache = plan.__dict__.setdefault("_masks", {})
    if (layer, length) not in cache:
        cache[layer, length] = plan.mask(layer, length)
    return cache[layer, length]


def _embedded(hidden: Tensor, plan: Plan, repeats: int) -> Tensor:
    hidden, unread = hidden.clone(), list(plan.embedded)
    for row, columns in enumerate(plan.visual):
        states = unread.pop(0) if columns else None
        for copy in range(row * repeats, (row + 1) * repeats):
            hidden[copy, columns] = hidden[copy, columns] if states is None else states
    return hidden


def _merge(hidden: Tensor, stage: Stage, repeats: int) -> Tensor:
    hidden = hidden.clone()
    for row, merge in enumerate(stage.merges):
        if merge is None:
            continue
        sources, targets, weights = merge
        for copy in range(row * repeats, (row + 1) * repeats):
            hidden[copy, targets] = (weights.float() @ hidden[copy, sources].float()).to(hidden.dtype)
    return hidden


def _renumbered(positions: Tensor, plan: Plan, stage: Stage, hidden: Tensor, repeats: int) -> Tensor:
    """Survivors are 0..n-1, the first generated token is n, and so on."""
    batch, length = hidden.shape[:2]
    positions = positions.expand(*positions.shape[:-2], batch, length).clone()
    for row in range(batch):
        alive = stage.alive[row // repeats]
        after = positions[..., row, plan.prompt :].clone()
        positions[..., row, :] = 0
        positions[..., row, alive] = torch.arange(len(alive))
        if after.shape[-1]:
            positions[..., row, plan.prompt :] = after - after[..., :1] + len(alive)
    return positions
