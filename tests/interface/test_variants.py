"""Variant names, method parameters on the command line, and what a cell's hash covers."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from ivcp_eval.interface import variants
from ivcp_eval.interface.variants import CostTarget, Variant
from ivcp_eval.runs.planning.cells import Identity


@pytest.mark.parametrize(
    "variant",
    [
        Variant("tiny"),
        Variant("qwen25", "ivc_prune", 0.5),
        Variant("x_1", "fastv+ivc", 0.11),
        Variant("tiny", "fastv", 0.6, budget=CostTarget.of("layer_mean", 0.6)),
        Variant("tiny", "fastv", 0.25, budget=CostTarget.of("flops", 0.25)),
        Variant("tiny", "fastv", 0.25, {"layer": 1}, budget=CostTarget.of("flops", 0.25, (576, 40))),
        Variant("tiny", "random", 0.5, seed=3),
        Variant("tiny", "fastv", 0.12345678),
        Variant("tiny", "ivc_prune", 0.5, {"preset": "official", "layer": 16, "ivc": 0.2, "foreground": False}),
        Variant("tiny", "x", 0.5, {"a": None, "b": "null", "c": "a__b_", "d": "../e f=%25", "g": [1, "_"], "h": ""}),
    ],
)
def test_names_come_back_and_are_file_names(variant: Variant) -> None:
    assert variants.parse(variant.name) == variant
    assert re.fullmatch(r"[\w.=+,%-]+", variant.name, flags=re.ASCII)


def test_names_tell_apart_what_differs_in_a_parameter_or_the_seed() -> None:
    base = Variant("tiny", "fastv", 0.5)
    more = [{"parameters": {"layer": 3}}, {"parameters": {"layer": "3"}}, {"seed": 1}, {"ratio": 0.50000001}]
    names = [base.name, *(dataclasses.replace(base, **fields).name for fields in more)]
    assert len(set(names)) == len(names)
    assert names[1] == "tiny__fastv__r0.5__layer=3"


def test_what_goes_without_saying_is_not_in_a_name() -> None:
    defaults, own = {"layer": 2, "ivc": 0.1}, {"layer": 4}

    def tuned(**parameters: object) -> Variant:
        return Variant("m", "x", 0.5, parameters).tuned(own, defaults)

    assert tuned().name == tuned(layer=4).name == tuned(ivc=0.1).name == "m__x__r0.5"
    assert tuned().parameters == {"layer": 4}
    assert tuned(layer=2).name == "m__x__r0.5__layer=2", "the checkpoint would be run at 4"
    assert tuned(layer=2, ivc=0.3).name == "m__x__r0.5__ivc=0.3__layer=2"
    assert variants.parse(tuned(ivc=0.3).name).tuned(own, defaults) == tuned(ivc=0.3)


def test_several_numbers_at_the_default_go_without_saying() -> None:
    """A class has a tuple where a record has a list."""
    said = Variant("m", "x", 0.5, {"cube": [4, 4, 4]})
    assert said.tuned({}, {"cube": (4, 4, 4)}).name == "m__x__r0.5"
    assert said.tuned({"cube": (4, 4, 4)}, {"cube": (2, 2, 2)}).implied == ("cube",)
    other = said.tuned({}, {"cube": (2, 2, 2)})
    assert Variant.from_json(json.loads(json.dumps(other.to_json()))).key == variants.parse(other.name).key == other.key


@pytest.mark.parametrize("name", ["tiny__fastv__r0.5__layer", "tiny__fastv__r0.5__seed=x", "tiny__fastv__r0.5____a=1"])
def test_bad_parameters_in_a_name_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="__KEY=VALUE for every parameter"):
        variants.parse(name)


def test_ratio_defaults_to_a_half() -> None:
    assert variants.parse("tiny__fastv") == Variant("tiny", "fastv", 0.5)


@pytest.mark.parametrize(
    "name",
    ["tiny__", "tiny__fastv__0.5", "tiny__fastv__r0", "tiny__fastv__r2", "__fastv__r0.5", "tiny__fastv__cost0.5"],
)
def test_other_forms_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="MODEL__METHOD__rRATIO"):
        variants.parse(name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layer=16", ("layer", 16)),
        ("ivc=0.2", ("ivc", 0.2)),
        ("preset=official", ("preset", "official")),
        ("foreground=false", ("foreground", False)),
        ("foreground=False", ("foreground", False)),
        ("layer=null", ("layer", None)),
    ],
)
def test_parameters_are_json_or_text(text: str, expected: tuple[str, object]) -> None:
    assert variants.parameter(text) == expected


IDENTITY = Identity(
    variant=Variant("tiny", "fastv", 0.5),
    method_parameters={"layer": 2},
    weights="abc",
    benchmark="tiny_mcq",
    data="0" * 64,
    scoring="2" * 64,
    limit=None,
    prompt="1" * 64,
    judge="none",
    limits={"min_pixels": None},
    placement={"device": "cpu"},
    versions={"torch": "2.13.0"},
    code="deadbeef",
)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Identity)])
def test_every_field_changes_the_hash(field: str) -> None:
    value = getattr(IDENTITY, field)
    changed = {
        "variant": Variant("tiny", "fastv", 0.5, seed=1),
        "limit": 3,
    }.get(field, {**value, "new": 1} if isinstance(value, dict) else f"{value}x")
    assert dataclasses.replace(IDENTITY, **{field: changed}).hash != IDENTITY.hash


def test_equal_content_has_equal_hash() -> None:
    again = dataclasses.replace(IDENTITY, versions={"torch": "2.13.0"}, method_parameters={"layer": 2})
    assert again.hash == IDENTITY.hash


def test_hashes_of_before_there_were_budgets_stay() -> None:
    """The hash of this identity, computed at commit 6b80c9f."""
    assert IDENTITY.hash == "d335ae745125e4dc"


def test_a_budget_is_part_of_the_hash_and_comes_back() -> None:
    held = dataclasses.replace(Variant("tiny", "fastv", 0.5), budget=CostTarget("flops", 0.7, (1024, 64), problem=""))
    budgeted = dataclasses.replace(IDENTITY, variant=held)
    assert budgeted.hash != IDENTITY.hash
    other = dataclasses.replace(held, budget=CostTarget("flops", 0.7, (576, 64), problem=""))
    assert dataclasses.replace(IDENTITY, variant=other).hash != budgeted.hash
    assert Variant.from_json(json.loads(budgeted.canonical)["variant"]) == held
    assert Variant.from_json(json.loads(IDENTITY.canonical)["variant"]) == IDENTITY.variant


@pytest.mark.parametrize(
    ("kind", "prompt", "said"),
    [
        ("layers", None, "budget 'layers' is unknown; use own .*final, layer_mean, flops"),
        ("flops", (0, 5), r"prompt \[0, 5\] is not VISUAL TEXT"),
        ("flops", (5,), "not VISUAL TEXT"),
        ("own", (5, -1), "not VISUAL TEXT"),
    ],
)
def test_bad_budgets_are_refused(kind: str, prompt: tuple[int, ...] | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CostTarget.of(kind, 0.5, prompt)


def test_a_prompt_matters_for_flops_only() -> None:
    assert CostTarget.of("own", 0.5) is None
    flops = CostTarget.of("flops", 0.5, (576, 40))
    assert flops is not None
    assert flops.label == "flops(576+40)"
    assert CostTarget.of("final", 0.5, (576, 40)) == CostTarget.of("final", 0.5)
