"""What the label `faithful` holds for: the released numbering of positions by default, and a label that follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ivcp_eval.interface import Cut, ModelFacts, registry
from ivcp_eval.interface.registry import make_method
from tests.engine import tiny_models
from tests.methods.material import pruned_columns, random_signals

RENUMBERED = ("pyramiddrop", "sparsevlm", "visionzip", "divprune", "vispruner", "holov", "vscan")


@pytest.mark.parametrize("family", registry.family_names())
@pytest.mark.parametrize("name", RENUMBERED)
def test_survivors_are_numbered_as_released(name: str, family: str) -> None:
    model, _ = tiny_models.build(family)
    facts = registry.adapter(family).facts(model.config, family)
    renumbered = {cut.renumber for cut in make_method(name).cuts(facts, 0.5) if cut.ratio < 1}
    assert renumbered == {not family.startswith("qwen")}
    for asked in (True, False):
        cuts = make_method(name, {"renumber": asked}).cuts(facts, 0.5)
        assert {cut.renumber for cut in cuts if cut.ratio < 1} == {asked}


@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm"])
def test_the_numbering_changes_what_later_stages_keep(name: str) -> None:
    """Why a default that keeps positions was not the released method."""
    differs = 0
    for seed in range(6):
        inputs = tiny_models.make_inputs("llava", "t5 i0 t9 i0 t6", seed=seed)
        default, kept = (pruned_columns(name, "llava", inputs, 0.4, **extra) for extra in ({}, {"renumber": False}))
        assert default == pruned_columns(name, "llava", inputs, 0.4, renumber=True)
        differs += default != kept
    assert differs


@pytest.mark.parametrize("name", RENUMBERED)
def test_the_label_follows_the_parameters(name: str) -> None:
    assert make_method(name).label == make_method(name, {"renumber": True}).label == "faithful"
    assert make_method(name, {"renumber": False}).label == "variant"
    assert make_method("sparsevlm", {"recycle": False}).label == "variant"
    assert make_method("holov", {"fill": "best"}).label == "variant"
    for method in registry.method_names():
        assert make_method(method).label == make_method(method).faithfulness


def test_contextual_targets_of_visionzip_are_those_of_the_released_code() -> None:
    """There the class token is one of the 54 dominant ones; a 54th patch in its place would shift the stride."""
    from ivcp_eval.methods.visionzip import contextual_tokens

    signals = random_signals((24, 24), ratio=64 / 576)
    importance = torch.randn(576, generator=torch.Generator().manual_seed(1))
    signals.vision = {**signals.vision, "cls": importance}
    selection = make_method("visionzip").select(signals)
    dominant = importance.topk(53).indices.sort().values
    targets, merge = contextual_tokens(signals.vision["key"], dominant, 10)
    assert set(targets.tolist()) | set(dominant.tolist()) <= set(selection.keep.tolist())
    assert selection.keep.numel() == 64
    assert selection.merge is not None
    rows = [selection.keep.tolist().index(target) for target in targets.tolist()]
    assert torch.allclose(selection.merge.to_dense()[rows], merge.to_dense())


@pytest.mark.parametrize(("name", "stage"), [("visionzip", 0), ("sparsevlm", 1)])
def test_merged_tokens_stand_last_where_survivors_are_numbered_anew(name: str, stage: int) -> None:
    """The same states as where every token keeps its place; those of several tokens behind those of one."""
    signals = replace(random_signals((8, 12), ratio=0.4, stage=stage), memory={"raters": torch.arange(3, 6)})
    states, found = signals.hidden[signals.visual], {}
    for renumber in (False, True):
        selection = make_method(name).select(replace(signals, cut=Cut(stage, 0.4, renumber=renumber)))
        assert selection.merge is not None
        found[renumber] = selection.keep, selection.merge.to_dense()
    assert torch.equal(found[False][0], found[True][0])
    for rows in found.values():
        assert torch.allclose((rows[1] @ states).sum(0), (found[False][1] @ states).sum(0), atol=1e-4)
    several = [(rows[1] > 0).sum(dim=1) > 1 for rows in found.values()]
    n_merged = int(several[1].sum())
    assert n_merged == int(several[0].sum()) > 1
    assert several[1].nonzero().flatten().tolist() == list(range(len(several[1]) - n_merged, len(several[1])))
    assert several[0].tolist() != several[1].tolist()
    alone = found[True][1][~several[1]].argmax(dim=1)
    assert alone.tolist() == sorted(alone.tolist())


def test_rank_rule_on_a_published_model() -> None:
    facts = ModelFacts("llava", 32)
    assert [cut.layer for cut in make_method("sparsevlm", {"counts": "rank"}).cuts(facts, 0.1)][1:] == [3, 7, 16, 20]
