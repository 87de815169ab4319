"""The baseline answered a second time prunes nothing."""

from __future__ import annotations

from ivcp_eval.interface import ModelFacts
from ivcp_eval.interface.registry import make_method


def test_no_cut_and_a_pass_of_its_own() -> None:
    again, none = make_method("again"), make_method("none")
    assert again.cuts(ModelFacts("llava", 8), 0.3) == none.cuts(ModelFacts("llava", 8), 0.3) == ()
    assert again.repeats_baseline
    assert not none.repeats_baseline
