"""``--budget``: from the command line and from a VLMEvalKit model name."""

from __future__ import annotations

import pytest

from ivcp_eval.reports.table import read_samples
from ivcp_eval.runs.answering.live import from_variant_name
from tests.runs.conftest import Lab


def test_a_budget_is_solved_said_and_measured(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--data", "tiny_mcq", "--limit", "3", "--method", "fastv", "--ratio", "0.6")
    assert lab.eval(*asked, "--budget", "layer_mean") == 0
    said = capsys.readouterr().out
    assert "tiny__fastv__layer_mean0.6 runs at retention ratio 0.4667" in said
    assert "fastv 0.6 of layer_mean" in said, "the comparison names what was held"
    (row,) = [row for row in lab.rows() if row["method"] == "fastv" and row["metric"] == "accuracy"]
    assert (row["ratio_asked"], row["budget"]) == (0.6, "layer_mean")
    assert row["ratio_method"] == pytest.approx(1 - 0.4 * 8 / 6)
    for sample in read_samples(lab.csv.parent / row["predictions"]):
        assert sample["layer_mean_ratio"] == pytest.approx(0.6, abs=1 / sample["visual_tokens"])
        assert sample["visual_kept"] / sample["visual_tokens"] < sample["flops_ratio"] < 1
    assert lab.eval(*asked) == 0
    assert "reusing 1 finished of 2 cells" in capsys.readouterr().out, "its own ratio of 0.6 is another cell"
    assert lab.eval(*asked, "--budget", "own") == 0
    assert "every cell is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "layer_mean", "--ratio", "0.2"), "costs at least 0.25 of the unpruned model"),
        (("--budget", "layers"), "use own (the method's own ratio), final, layer_mean, flops"),
        (("--budget", "flops", "--budget-prompt", "0", "9"), "prompt [0, 9] is not VISUAL TEXT"),
    ],
)
def test_what_cannot_be_held_is_refused_before_anything_runs(
    lab: Lab, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert lab.eval("--limit", "1", "--data", "tiny_mcq", "--method", "fastv", *arguments) == 2
    assert words in capsys.readouterr().err
    assert not (lab.folder / "runs").exists()


def test_a_vlmevalkit_name_holds_a_budget_too() -> None:
    variant = from_variant_name("tiny__ivc_prune__flops0.7").answer.variant
    assert variant.budget is not None
    assert variant.budget.label == "flops(1024+64)"
    assert variant.budget.problem == ""
    assert 0 < variant.ratio < 0.7
    with pytest.raises(ValueError, match="needs an earlier cut"):
        from_variant_name("tiny__ivc_prune__layer_mean0.1")
