"""`fork`: one prompt under many variants in one pass, each with the tokens of its own single run.

What the variants share is computed once: the vision encoder and every decoder layer below a variant's first cut. See
docs/design/fork.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from ivcp_eval.engine import prune, resolve
from ivcp_eval.engine.fork.join import claim, join
from ivcp_eval.engine.fork.trunk import Branch, End, Joined, Trunk
from ivcp_eval.engine.hooks.selftest import self_test
from ivcp_eval.engine.parts import Parts, Resolved
from ivcp_eval.engine.prefill import read_choices
from ivcp_eval.engine.run import Run
from ivcp_eval.interface import AbstractMethod, Signal
from ivcp_eval.interface.names import spelling, spellings
from ivcp_eval.interface.variants import Variant

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Answer", "Ready", "fork"]

#: Options of `generate` whose meaning for one row depends on the others or on chance.
REFUSED = ("num_beams", "num_return_sequences", "stopping_criteria", "stop_strings", "streamer", *spellings("cache"))
#: Part of the free memory that variants may take; the rest is for activations and fragments.
SHARE = 0.7


@dataclass(frozen=True)
class Answer:
    """What one variant answered.

    Attributes:
        tokens: per row of the inputs the new tokens, int64 on CPU, up to and with the first end-of-sequence token.
        run: the facts of its prefill.
    """

    tokens: tuple[Tensor, ...]
    run: Run


@dataclass(frozen=True)
class Ready:
    """A method at hand in place of a registered one, for controlled comparisons; its ``parameters`` are its fields."""

    method: AbstractMethod
    ratio: float
    seed: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict, init=False)


@dataclass(frozen=True)
class _Plan:
    """One variant, resolved."""

    variant: Variant | Ready
    resolved: Resolved

    @property
    def alone(self) -> bool:
        """Whether nothing can be shared: it works in the tower, on every layer, cache or step, or only observes."""
        one = self.resolved
        observes = bool(one.cuts) and one.first_cut is None
        return one.works_on_tower or one.works_on_cache or one.is_sparse or observes


def fork(
    model: Any,
    variants: Sequence[Variant | Ready],
    inputs: Mapping[str, Any],
    *,
    family: str | None = None,
    layout: Mapping[str, Any] | None = None,
    exact: bool = False,
    at_once: int | None = None,
    too_many: Callable[[int], None] | None = None,
    fitted: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Answer]:
    """Answer one batch of prompts greedily under every variant.

    Args:
        model: as in `ivcp_eval.prune`.
        variants: method, ratio, parameters and seed of each; a variant's ``model`` is not read.
        inputs: of ``model.generate``, B rows padded on the left.
        family: adapter name; found from the model if not given. layout: further options of `prune` (``tiles``, ...).
        exact: run one variant after the other instead. Bits are then those of single runs in half precision too, where
            a batch rounds differently from a single row.
        at_once: most variants to decode together; default: as many as fit the free memory. 0: nothing is shared.
        too_many: called when memory ran out, with the ``at_once`` that is worth a try next time. fitted: called when so
            many variants were decoded together.
        **options: of ``generate``; logits processors see each row's own tokens. Beams, sampling and stop rules that
            look at the whole batch are refused.

    Returns:
        One `Answer` per variant, in order. Variants that cut nothing share one row.

    Raises:
        ValueError: as `prune`; an option that a batch of variants cannot honour; a method that changes the picture.
        torch.OutOfMemoryError: one variant alone does not fit.
    """
    plans = [_plan(model, variant, family) for variant in variants]
    _check(plans, options)
    if any(plan.resolved.cuts for plan in plans):
        self_test(model, plans[0].resolved.adapter, plans[0].resolved.family)
    layout = dict(layout or {})
    # Variants that remove nothing are the trunk: one row answers for all of them.
    plain = [i for i, plan in enumerate(plans) if not plan.resolved.cuts and not plan.alone]
    distinct = {i: plan for i, plan in enumerate(plans) if i not in plain[1:]}
    shared = {} if exact or at_once == 0 else {i: plan for i, plan in distinct.items() if not plan.alone}
    callbacks = too_many or _nobody, fitted or _nobody
    answers = _together(model, shared, inputs, layout, at_once, *callbacks, options) if len(shared) > 1 else {}
    for i in (i for i in distinct if i not in answers):
        answers[i] = _single(model, plans[i], inputs, layout, options)
    for i in plain[1:]:
        answers[i] = answers[plain[0]]
    return [
        Answer(answers[i].tokens, replace(answers[i].run, method=plan.resolved.name, ratio=plan.variant.ratio))
        for i, plan in enumerate(plans)
    ]


def _plan(model: Any, variant: Variant | Ready, family: str | None) -> _Plan:
    return _Plan(variant, resolve(model, variant.method, variant.ratio, family, variant.parameters))


def _check(plans: Sequence[_Plan], options: Mapping[str, Any]) -> None:
    refused = [name for name in REFUSED if options.get(name) not in (None, 1)]
    refused += [name for name, bad in (("do_sample", True), ("use_cache", False)) if options.get(name) is bad]
    if refused:
        raise ValueError(f"fork decodes greedily and cannot honour {', '.join(refused)}; use `prune` for each variant")
    for plan in plans:
        share = plan.resolved.method.pixel_share(plan.variant.ratio) if plan.variant.ratio < 1 else None
        if share is not None:
            raise ValueError(
                f"method {plan.resolved.name!r} changes the picture itself; encode its own and run it with `prune`"
            )


def _single(
    model: Any, plan: _Plan, inputs: Mapping[str, Any], layout: Mapping[str, Any], options: Mapping[str, Any]
) -> Answer:
    method, family = plan.resolved.method, plan.resolved.family
    with prune(model, method, plan.variant.ratio, family=family, seed=plan.variant.seed, **layout) as run:
        out = model.generate(**inputs, **{"do_sample": False, **options})
    return Answer(_rows(model, out, inputs["input_ids"].shape[1], options), run)


def _rows(model: Any, sequences: Any, prompt_length: int, options: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The new tokens of each row, without the padding that follows its end."""
    sequences = getattr(sequences, "sequences", sequences)
    given = options.get("generation_config") or model.generation_config
    ends = options.get("eos_token_id", given.eos_token_id)
    ends = torch.tensor([] if ends is None else ends, dtype=torch.int64).flatten()
    rows = []
    for row in sequences[:, prompt_length:].cpu():
        stops = torch.isin(row, ends).nonzero().flatten()
        rows.append(row[: int(stops[0]) + 1] if stops.numel() else row)
    return tuple(rows)


def _together(
    model: Any,
    plans: Mapping[int, _Plan],
    inputs: Mapping[str, Any],
    layout: Mapping[str, Any],
    at_once: int | None,
    too_many: Callable[[int], None],
    fitted: Callable[[int], None],
    options: Mapping[str, Any],
) -> dict[int, Answer]:
    """Answers of all variants but those that did not fit into memory beside the trunk."""
    answers: dict[int, Answer] = {}
    try:
        trunk = _trunk(model, plans, inputs, layout)
    except torch.OutOfMemoryError:
        too_many(0)
        return answers
    groups = _groups(list(plans), trunk, at_once, options)
    while groups:
        group = groups.pop(0)
        try:
            answers |= _pass(trunk, {i: plans[i] for i in group}, inputs, options)
            fitted(len(group))
        except torch.OutOfMemoryError:
            half = len(group) // 2
            too_many(len(group) - half if half else 0)
            groups = [part for part in (group[:half], group[half:]) if half] + groups
            _release(model)
    return answers


def _nobody(_count: int) -> None:
    """Nobody wants to know what fitted."""


def _trunk(model: Any, plans: Mapping[int, _Plan], inputs: Mapping[str, Any], layout: Mapping[str, Any]) -> Trunk:
    layers: dict[int, frozenset[Signal]] = {}
    for plan in plans.values():
        resolved = plan.resolved
        for cut in resolved.cuts:
            if resolved.first_cut is not None and cut.layer <= resolved.first_cut:
                layers[cut.layer] = layers.get(cut.layer, frozenset()) | resolved.method.needs | cut.needs
    some = next(iter(plans.values())).resolved
    whole = any(not plan.resolved.cuts for plan in plans.values())
    methods = [plan.resolved.method for plan in plans.values() if plan.resolved.cuts]
    trunk = Trunk(model, some.adapter, some.family, dict(sorted(layers.items())), whole, layout, methods)
    trunk.prefill(inputs)
    return trunk


def _pass(
    trunk: Trunk, plans: Mapping[int, _Plan], inputs: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[int, Answer]:
    """Branches, join and decoding of one group of variants."""
    ends = _ends(trunk, plans.values())
    runs = [end.run for end in ends]
    ids = inputs["input_ids"]
    length = ids.shape[1]
    hidden, layers = join(ends, length)
    del ends
    mask = inputs.get("attention_mask")
    prompt = {
        "input_ids": ids.repeat_interleave(len(plans), dim=0),
        "attention_mask": (torch.ones_like(ids) if mask is None else mask).repeat_interleave(len(plans), dim=0),
        spelling("cache"): claim(layers, length - 1),
    }
    positions = trunk.position_ids
    if positions is not None and positions.ndim == 3 and ids.shape[0] > 1:
        # M-RoPE models remember one offset per row of the trunk; given positions need no such memory.
        prompt["position_ids"] = positions.repeat_interleave(len(plans), dim=1)
    joined = Joined(trunk, hidden, layers)
    del hidden, layers
    try:
        joined.attach()
        model: Any = trunk.model
        out = model.generate(**prompt, **{"do_sample": False, **options})
    finally:
        joined.detach()
    rows = _rows(trunk.model, out, length, options)
    return {i: Answer(rows[v :: len(plans)], runs[v]) for v, i in enumerate(plans)}


def _ends(trunk: Trunk, plans: Iterable[_Plan]) -> list[End]:
    """Every variant after its prefill; the host waits once for what all methods chose in the trunk."""
    branches = [_branch(trunk, plan) for plan in plans]
    chosen = [one.choices for branch in branches if branch is not None for one in branch.chosen.values()]
    read = iter(read_choices(chosen))
    return [
        trunk.end() if branch is None else branch.prefill({layer: next(read) for layer in branch.chosen})
        for branch in branches
    ]


def _branch(trunk: Trunk, plan: _Plan) -> Branch | None:
    first = plan.resolved.first_cut
    if first is None or trunk.prompt is None:  # cuts nothing, or a text-only prompt
        return None
    return Branch(Parts(trunk.model, plan.resolved, seed=plan.variant.seed), trunk, first)


# -- memory -----------------------------------------------------------------------------------------------------------


def _groups(pending: Sequence[int], trunk: Trunk, at_once: int | None, options: Mapping[str, Any]) -> list[list[int]]:
    """As few groups as fit, of nearly equal size."""
    fits = at_once or max(1, int(SHARE * free_memory(trunk.model) / _variant_bytes(trunk, options)))
    count = -(-len(pending) // fits)
    size = -(-len(pending) // count) if count else 1
    return [list(pending[start : start + size]) for start in range(0, len(pending), size)]


def _variant_bytes(trunk: Trunk, options: Mapping[str, Any]) -> int:
    """Upper bound of what one variant adds: its own cache and its padded rows, grown by the new tokens."""
    assert trunk.cache is not None
    filled = [layer for layer in trunk.cache.layers if layer.is_initialized and layer.keys.numel()]
    if not filled:
        return 1  # every variant cuts at the input: nothing was cached yet, nothing is known
    length = filled[0].keys.shape[-2]
    prompt = sum(layer.keys.nbytes + layer.values.nbytes for layer in filled) * len(trunk.cache.layers) // len(filled)
    model: Any = trunk.model
    grown = length + int(options.get("max_new_tokens") or model.generation_config.max_new_tokens or 20)
    return prompt + prompt * grown // length


def free_memory(model: Any) -> int:
    """Bytes that can be allocated on the model's device; the scarcest one's if it lies on several."""
    devices = {parameter.device for parameter in model.parameters()}
    free = []
    for device in devices:
        if device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free.append(torch.cuda.mem_get_info(device)[0] + cached)
        else:
            import psutil

            free.append(psutil.virtual_memory().available)
    return min(free)


def _release(model: Any) -> None:
    """Give back what lies in fragments; not after every pass, for the host then waits, and all is allocated anew."""
    if any(parameter.device.type == "cuda" for parameter in model.parameters()):
        torch.cuda.empty_cache()
