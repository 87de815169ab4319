"""Methods that hold an equal budget cost the same where it is measured; what cannot hold it is a row that says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from ivcp_eval.engine.cost.flops import DecoderShape
from ivcp_eval.engine.cost.predicted import Decoder, solve_budget
from ivcp_eval.interface import ModelFacts, models
from ivcp_eval.reports.table import Row, read_results, read_samples
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import SpecError, load
from tests.runs.conftest import Bench

METHODS = ("ivc_prune", "fastv", "pyramiddrop", "sparsevlm", "random")
SPEC = """
models: {{tiny: {model}}}
benchmarks: [tiny_short]
methods:
  - {{method: ivc_prune, ratios: [0.6], budget: layer_mean}}
  - {{method: fastv, ratios: [0.6], budget: layer_mean}}
  - {{method: pyramiddrop, ratios: [0.6], budget: layer_mean}}
  - {{method: sparsevlm, ratios: [0.6], budget: layer_mean}}
  - {{method: random, seeds: [0], ratios: [0.6], budget: layer_mean}}
  - {{method: ivc_prune, ratios: [0.8]}}
  - {{method: fastv, ratios: [0.8]}}
  - {{method: pyramiddrop, ratios: [0.8]}}
  - {{method: sparsevlm, ratios: [0.8]}}
  - {{method: random, seeds: [0], ratios: [0.8]}}
  - {{method: fastv, ratios: [0.8], budget: own}}
  - {{method: ivc_prune, ratios: [0.25], parameters: {{layer: 4}}, budget: layer_mean}}
  - {{method: rotatek, ratios: [0.5], budget: final}}
budget: flops
budget_prompt: [{visual}, {text}]
limit: 4
max_new_tokens: 3
timing: false
"""


@pytest.fixture
def held(bench: Bench, random_model: Path) -> Bench:
    bench.spec.write_text(SPEC.format(model=random_model, visual=150, text=40))
    return bench


def _held(rows: list[Row], kind: str) -> dict[str, Row]:
    found = {row["method"]: row for row in rows if row["budget"] == kind and row["ratio_asked"] in (0.6, 0.8)}
    assert set(METHODS) <= set(found)
    return {method: found[method] for method in METHODS}


def test_measured_costs_are_equal_and_what_cannot_be_held_is_a_row(
    held: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert held.call("plan") == 0
    planned = capsys.readouterr().out
    assert "tiny__fastv__layer_mean0.6 runs at retention ratio 0.4667, which costs 0.6 of layer_mean" in planned
    assert "tiny__ivc_prune__layer_mean0.25__layer=4 cannot run: layer_mean: this method costs at least" in planned
    assert held.call("run") == 0, "what a model cannot do is no failure"
    said = capsys.readouterr().out
    rows = [row for row in read_results(held.csv) if row["metric"] == "accuracy"]

    for row in _held(rows, "layer_mean").values():
        assert row["ratio_asked"] == 0.6
        for sample in read_samples(held.csv.parent / row["predictions"]):
            one_token = 1 / sample["visual_tokens"]
            assert sample["layer_mean_ratio"] == pytest.approx(0.6, abs=one_token), row["method"]

    flops = _held(rows, "flops(150+40)")
    for row in flops.values():
        assert row["ratio_method"] < row["ratio_asked"] == 0.8
        samples = read_samples(held.csv.parent / row["predictions"])
        for sample, other in zip(samples, read_samples(held.csv.parent / flops["fastv"]["predictions"]), strict=True):
            assert sample["flops_ratio"] == pytest.approx(other["flops_ratio"], abs=1 / sample["visual_tokens"])
        assert row["ratio_flops"] == pytest.approx(0.8, abs=0.02), "the prompts are only nearly the one stated"

    (own,) = [row for row in rows if row["method"] == "fastv" and row["budget"] == ""]
    assert own["ratio_asked"] == own["ratio_method"] == 0.8
    failed = {row["method"]: row for row in read_results(held.csv) if row["status"] == "skipped"}
    assert set(failed) == {"ivc_prune", "rotatek"}
    assert failed["ivc_prune"]["reason"].startswith("layer_mean: this method costs at least 0.5 of")
    assert "does not follow its retention ratio" in failed["rotatek"]["reason"]
    assert failed["rotatek"]["ratio_method"] is None
    assert failed["rotatek"]["ratio_asked"] == 0.5
    assert "cannot run: tiny rotatek final0.5 on tiny_short: final: this method's final cost" in said
    table = (held.csv.with_suffix("") / "tiny.csv").read_text()
    assert "\nfastv,0.6,layer_mean," in table
    assert "\nfastv,0.8,flops(150+40)," in table


def test_the_stated_prompt_is_part_of_a_cell(held: Bench, random_model: Path) -> None:
    def hashes(visual: int) -> dict[str, set[str]]:
        held.spec.write_text(SPEC.format(model=random_model, visual=visual, text=40))
        plan = make(load(held.spec), held.folder / "runs")
        found: dict[str, set[str]] = {}
        for _, _, cell in plan.cells():
            budget = cell.identity.variant.budget
            found.setdefault(budget.kind if budget else "", set()).add(cell.identity.hash)
        return found

    before, after = hashes(150), hashes(600)
    assert before["flops"].isdisjoint(after["flops"])
    assert {kind: before[kind] for kind in ("", "layer_mean")} == {kind: after[kind] for kind in ("", "layer_mean")}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("budget: flops\n", "budget: flop\n", "line 18: budget 'flop' is unknown; use own"),
        ("budget: own}", "budget: cost}", "line 15: budget 'cost' is unknown"),
        ("[150, 40]", "[150]", r"line 19: prompt \[150\] is not VISUAL TEXT"),
        ("[150, 40]", "[150, many]", "line 19: 'many' is not a number of tokens"),
    ],
)
def test_mistakes_are_reported_with_their_line(held: Bench, old: str, new: str, said: str) -> None:
    text = held.spec.read_text()
    assert old in text
    held.spec.write_text(text.replace(old, new))
    with pytest.raises(SpecError, match=said):
        load(held.spec)


def test_rules_leave_out_by_budget(held: Bench) -> None:
    held.spec.write_text(held.spec.read_text() + "exclude:\n  - {method: fastv, budget: flops}\n")
    left = [variant for variant, _ in load(held.spec).cells if variant.method == "fastv"]
    assert [variant.name for variant in left] == ["tiny__fastv__layer_mean0.6", "tiny__fastv__r0.8"]


@pytest.mark.parametrize(("model", "layers"), [("qwen25", 28), ("internvl25", 32), ("llava15", 32)])
def test_the_shipped_comparison_can_be_held_on_its_models(model: str, layers: int) -> None:
    shape = DecoderShape(layers, hidden=4096, heads=32, kv_heads=8, head_dim=128, intermediate=14336)
    family, _ = models.find(model)
    decoder = Decoder(ModelFacts(family, layers), shape)
    spec = load(Path(__file__).parents[3] / "sweeps" / "equal_cost.yaml")
    held = [solve_budget(variant, decoder) for variant in spec.variants(model) if variant.budget]
    assert {variant.budget.kind for variant in held if variant.budget} == {"layer_mean", "flops"}
    assert [variant.budget.problem for variant in held if variant.budget and variant.budget.problem] == []
