"""Every (method, family) pair of the registries, and how a check runs one of them."""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import ivcp_eval
from ivcp_eval.interface import AbstractMethod, CachedKeys, Cut, Processed, Selection, Signals, Step, registry
from tests.engine import tiny_models
from tests.engine.contract.reference import Plan, make_plan
from tests.engine.contract.toys import TOYS

SINGLE = ("t5 i0 t9",)
RAGGED = ("t5 i0 t9", "t4 i1 t3 i2 t6", "t12")  # one image; two; text only: three lengths, left-padded
SEVERAL = ("t2 i1 i0 i1 t4",)
# A video; an image on either side of one, and another; text only. And images between videos, of which one ends all.
WITH_VIDEOS = ("t5 v0 t9",), ("t5 v0 t9", "t4 i1 t3 v1 t2 i2 t2 v0 t6", "t12"), ("t2 v1 i0 t1 v0 t4",)
PARAMETERS: dict[str, tuple[tuple[dict[str, Any], tuple[str, ...]], ...]] = {
    # The released DeepSeek code knows only 14 x 15 tiles, too many for a tiny model; tests/engine/oracle replays it.
    "ivc_prune": (({"preset": "official"}, ("qwen2_5_vl", "llava", "internvl")),),
    "snapkv": (({"heads": "shared"}, ("deepseek_vl2",)),),  # whose cache all heads share
    "adaspark": (
        ({"cube": (1, 2, 2)}, ("qwen2_5_vl", "llava", "deepseek_vl2")),
        ({"cube": (1, 2, 2), "p": 0.3, "heads": "mean", "queries": "cube", "first": 2}, ("llava",)),
    ),
    "fastv+dstp": (({"tau": 1.0, "hold": 1}, ("qwen2_5_vl", "llava")),),  # swaps in every step
}
"""Further parameters of a registered method that the whole contract must hold for, and on which families."""
WRAPPED = ("pyramiddrop+ivc", "visionzip+ivc", "pyramiddrop+dstp")
"""A method with scores (and stages) and one with sets (and merging), with coordinates forced in; one in reserve."""


@dataclass
class Recording:
    """What a method was asked and answered in a prune block, and the block's `Run`."""

    run: ivcp_eval.engine.Run  # type: ignore[name-defined]
    method: AbstractMethod
    cuts: tuple[Cut, ...]
    calls: list[tuple[Signals, Selection]] = field(default_factory=list)
    edits: list[tuple[int, Tensor]] = field(default_factory=list)
    steps: list[tuple[Step, Tensor | None]] = field(default_factory=list)
    sparse: list[tuple[int, Tensor | Processed | None]] = field(default_factory=list)

    def plan(self, inputs: dict[str, Any], placeholders: Container[int]) -> Plan:
        """The reference's plan of the last prefill, which `inputs` was; forgets the calls."""
        calls = [(signals.stage, selection) for signals, selection in self.calls]
        tower = "group" in self.method.tower_signals
        embedded = [signals.hidden[signals.visual] for signals, _ in self.calls if tower]
        edits, steps, sparse = list(self.edits), list(self.steps), list(self.sparse)
        self.calls.clear()
        self.edits.clear()
        self.steps.clear()
        self.sparse.clear()
        cuts = [cut for cut in self.cuts if cut.ratio < 1]  # the others only observe
        observed = {stage for stage, cut in enumerate(self.cuts) if cut.ratio == 1}
        renumbered = [
            (stage - sum(earlier < stage for earlier in observed), selection)
            for stage, selection in calls
            if stage not in observed
        ]
        plan = make_plan(inputs, placeholders, cuts, renumbered, edits)
        plan.add_steps(steps)
        plan.add_sparse(sparse)
        plan.embedded = embedded
        return plan


@dataclass(frozen=True)
class Case:
    """One method on one family."""

    family: str
    method: str
    parameters: tuple[tuple[str, Any], ...] = ()
    ratio: float = 0.5
    attn: str = field(default_factory=lambda: tiny_models.WHERE.attention)
    videos: bool = False

    def __str__(self) -> str:
        extra = "".join(f"-{value}" for _, value in self.parameters)
        return f"{self.method}{extra}-{self.family}{'-videos' * self.videos}"

    def but(self, **changes: Any) -> Case:
        """The case with another ratio or attention."""
        return replace(self, **changes)

    @property
    def model(self) -> nn.Module:
        """The family's tiny model."""
        return tiny_models.build(self.family, attn=self.attn)[0]

    @property
    def text_model(self) -> Any:
        """Its decoder."""
        return registry.adapter(self.family).text_model(self.model)

    @property
    def image_token(self) -> int:
        """The placeholder's id."""
        return int(tiny_models.family(self.family).IMAGE)

    @property
    def placeholders(self) -> tuple[int, ...]:
        """The ids of the placeholders of images and videos."""
        return self.image_token, getattr(tiny_models.family(self.family), "VIDEO", self.image_token)

    def is_visual(self, ids: Tensor) -> Tensor:
        """Which of the ids are placeholders."""
        return torch.isin(ids, torch.tensor(self.placeholders, device=ids.device))

    @property
    def single(self) -> tuple[str, ...]:
        """The layout of a batch of one row."""
        return WITH_VIDEOS[0] if self.videos else SINGLE

    @property
    def ragged(self) -> tuple[str, ...]:
        """Layouts of a batch: rows of unequal length, one of text only."""
        return WITH_VIDEOS[1] if self.videos else RAGGED

    @property
    def several(self) -> tuple[str, ...]:
        """The layout of a row with three images or more, some side by side."""
        return WITH_VIDEOS[2] if self.videos else SEVERAL

    def inputs(self, *layouts: str, seed: int = 0) -> dict[str, Any]:
        """Prompts; see `tests.engine.tiny_models`."""
        return tiny_models.make_inputs(self.family, *layouts, seed=seed)

    def image_sizes(self, layout: str) -> list[int]:
        """Visual tokens of each image of a layout, and of each grid step of its videos."""
        return [n for sizes in self._sizes(layout) for n in sizes]

    def clip_sizes(self, layout: str) -> list[int]:
        """How many images each clip of a layout is: 1, or the grid steps of a video."""
        return list(map(len, self._sizes(layout)))

    def _sizes(self, layout: str) -> list[tuple[int, ...]]:
        module = tiny_models.family(self.family)
        images, segments = module.N_TOKENS, tiny_models.parse(layout)
        return [
            (images[number % len(images)],) if kind == "image" else module.STEPS[number]
            for kind, number in segments
            if kind != "text"
        ]

    def make(self) -> AbstractMethod:
        """A fresh instance of the method."""
        if self.method in TOYS:
            return replace(TOYS[self.method])
        return registry.make_method(self.method, dict(self.parameters))

    @property
    def works_on_cache(self) -> bool:
        """Whether the method edits, evicts or masks what is cached, so that it needs a cache."""
        method = self.make()
        on_cache = bool(method.needs & {"cached_key", "step"})
        return on_cache or any(cut.evicts for cut in method.cuts(self.facts, 0.5))

    @property
    def masks_steps(self) -> bool:
        """Whether the method masks single steps, which neither beams nor drafts can follow."""
        return "step" in self.make().needs

    @cached_property
    def facts(self) -> Any:
        """What the method may know of the model."""
        return registry.adapter(self.family).facts(self.model.config, self.family)

    @contextmanager
    def prune(self, model: nn.Module | None = None, seed: int = 0) -> Iterator[Recording]:
        """`ivcp_eval.prune` with every call of ``select`` recorded."""
        method = self.make()
        cuts = method.cuts(self.facts, self.ratio) if self.ratio < 1 else ()
        select, edit, attend = method.select, method.edit_keys, method.attended
        seen, processed = method.attended_pairs, method.mlp_tokens
        calls, edits, steps, sparse = [], [], [], []

        def recording(signals: Signals) -> Selection:
            calls.append((signals, select(signals)))
            return calls[-1][1]

        def editing(cached: CachedKeys) -> Tensor:
            edits.append((cached.layer, edit(cached)))
            return edits[-1][1]

        def attending(step: Step) -> Tensor | None:
            steps.append((step, attend(step)))
            return steps[-1][1]

        def seeing(signals: Signals) -> Tensor | None:
            sparse.append((signals.cut.layer, seen(signals)))
            return sparse[-1][1]

        def processing(signals: Signals, states: Tensor) -> Processed | None:
            sparse.append((signals.cut.layer, processed(signals, states)))
            return sparse[-1][1]

        object.__setattr__(method, "attended_pairs", seeing)
        object.__setattr__(method, "mlp_tokens", processing)
        object.__setattr__(method, "select", recording)  # the instance is a frozen dataclass
        object.__setattr__(method, "edit_keys", editing)
        object.__setattr__(method, "attended", attending)
        layout = getattr(tiny_models.family(self.family), "PRUNE", {})
        with ivcp_eval.prune(self.model if model is None else model, method, self.ratio, seed=seed, **layout) as run:
            yield Recording(run, method, cuts, calls, edits, steps, sparse)

    def forward(self, inputs: dict[str, Any], model: nn.Module | None = None, **options: Any) -> Any:
        """One bare forward."""
        with torch.no_grad():
            return (self.model if model is None else model)(**inputs, **options)

    def generate(self, inputs: dict[str, Any], n: int = 3, model: nn.Module | None = None, **options: Any) -> Any:
        """``n`` new tokens with their raw logits and the cache; greedy unless asked otherwise."""
        options = {"do_sample": False} | options
        return (self.model if model is None else model).generate(
            **inputs,
            max_new_tokens=n,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )


def all_cases() -> list[Case]:
    """Every registered method (with its further parameter sets), some with ``+ivc``, on every family, and the toys.

    Toys exercise the engine, not the families: all of them run on one family with M-RoPE and one without, a few that
    touch what families differ in (masks, position embeddings, cached states) on the others.
    """
    methods = (*registry.method_names(), *WRAPPED)
    cases = [Case(family, method) for family in tiny_models.names() for method in methods]
    for method, sets in PARAMETERS.items():
        cases += [Case(family, method, tuple(chosen.items())) for chosen, families in sets for family in families]
    for family in tiny_models.names():
        toys = (
            list(TOYS) if family in ("qwen2_5_vl", "llava") else ["toy_stages_mixed", "toy_merge", "toy_renumber_once"]
        )
        cases += [Case(family, name) for name in toys]
        if hasattr(tiny_models.family(family), "STEPS"):
            cases += [Case(family, method, videos=True) for method in ON_VIDEOS]
    return cases


ON_VIDEOS: dict[str, frozenset[str]] = {
    "none": frozenset({"ratio_one_is_bit_equal"}),
    "toy_clips": frozenset(
        {
            "batch_equals_its_rows",
            "beams_equal_reference",
            "budget_is_exact_per_image",
            "cache_lengths_are_as_declared",
            "decode_equals_reference",
            "ratio_one_is_bit_equal",
            "second_turn_equals_reference",
            "uncached_equals_reference",
        }
    ),
    "visionzip": frozenset({"batch_equals_its_rows", "decode_equals_reference", "generate_offers_the_same_signals"}),
    "ivc_prune": frozenset({"budget_is_exact_per_image", "decode_equals_reference", "prefill_equals_reference"}),
    "snapkv": frozenset({"budget_is_exact_per_image", "decode_equals_reference"}),
    "fastv+dstp": frozenset({"decode_equals_reference"}),
    "aot": frozenset({"decode_equals_reference"}),  # merges across frames
    "dycoke": frozenset({"decode_equals_reference"}),  # cuts, and masks steps
    "adaspark": frozenset({"decode_equals_reference"}),  # whose cubes span frames
}
"""What runs on prompts with videos, by default: of each kind of method the checks in which a video could differ."""


MECHANICS = frozenset(
    {
        "beams_equal_reference",
        "cache_lengths_are_as_declared",
        "decode_equals_reference",
        "earlier_caches_hold_the_survivors",
        "manual_decoding_equals_reference",
        "nothing_is_left_behind",
        "prompt_lookup_equals_greedy",
        "question_before_image_equals_reference",
        "ratio_one_is_bit_equal",
        "sampling_equals_reference",
        "second_turn_equals_reference",
        "text_only_is_untouched",
        "uncached_equals_reference",
    }
)
"""Checks of the engine's work after the choice, which is the same work whatever was chosen."""


def wanted(check: str, case: Case) -> bool:
    """Whether a pair runs by default; ``pytest --every-pair`` runs all.

    `MECHANICS` run for `none`, the main method and the toys wherever these run, for every other method on two
    families: Qwen2.5-VL and one that its name decides.
    """
    if case.videos:
        return check in ON_VIDEOS[case.method]
    if check not in MECHANICS or case.method in TOYS or case.method in ("none", "ivc_prune"):
        return True
    families = tiny_models.names()
    return case.family in ("qwen2_5_vl", families[zlib.crc32(case.method.encode()) % len(families)])


def image_columns(ids: Tensor, placeholders: Container[int], sizes: list[int]) -> list[list[int]]:
    """The columns of each image of one row (S,): its placeholders, dealt out in order."""
    columns = [c for c, token in enumerate(ids.tolist()) if token in placeholders]
    assert len(columns) == sum(sizes)
    return [[columns.pop(0) for _ in range(size)] for size in sizes]
