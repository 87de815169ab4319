"""``ivcp analyse flips``: what is counted and tested, the controls' prompts, and answers taken from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ivcp_eval.runs.analysis import paraphrase
from ivcp_eval.runs.analysis.flips import Given, table
from tests.runs.analysis.conftest import Analyse
from tests.runs.conftest import Lab


def given(*scores: float) -> dict[str, Given]:
    return {str(i): Given("yes" if score else "no", score) for i, score in enumerate(scores)}


def test_flips_are_counted_and_tested_on_the_same_samples() -> None:
    answers = {
        "unpruned": given(1, 1, 1, 1, 1, 1, 1, 0),
        "resized": given(0, 1, 1, 1, 1, 1, 1, 0),
        "pruned": given(1, 0, 0, 0, 0, 0, 0, 1),
    }
    alone = {str(i): str(i) for i in range(8)}
    control, tested = table(answers, alone, ["resized"], "verdict")
    assert (control["change"], control["right_to_wrong"], control["against"]) == ("resized", 1, "")
    assert (tested["right_to_wrong"], tested["wrong_to_right"]) == (6, 1)
    assert tested["difference"] == pytest.approx(100 * (7 - 1) / 8)
    # One sample flips by the control alone, seven by pruning alone: 2 (C(8,0) + C(8,1)) / 2^8.
    assert (tested["test"], tested["p_value"]) == ("McNemar", pytest.approx(2 * 9 / 256))
    assert table(answers, dict.fromkeys(alone, "one"), ["resized"], "verdict")[1]["test"] == "permutation"


def test_a_sample_that_a_condition_lacks_is_left_out_of_all() -> None:
    answers = {"unpruned": given(1, 1), "resized": given(1, 0), "pruned": {"0": Given("no", 0)}}
    control, tested = table(answers, {"0": "a", "1": "b"}, ["resized"], "answer")
    assert control["n"] == tested["n"] == 1
    assert (control["answers_changed"], tested["answers_changed"]) == (0, 100)


@pytest.mark.parametrize(
    ("question", "worded"), [("red circle", "the red circle in this image"), ("the man", "the man in this image")]
)
def test_templates_keep_every_word(question: str, worded: str) -> None:
    assert paraphrase.fill(paraphrase.PHRASES["in this image"], question) == worded
    for kind in ("grounding", "mcq", None):
        assert all(question in paraphrase.fill(t, question) for t in paraphrase.templates(kind).values())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("index\ttext\n1\tx\n", "missing: question"),
        ("index\tquestion\n1\tx\n1\ty\n", "occur more than once"),
        ("index\tquestion\n1\tx\n", "no question for 1 of 2 rows that are asked, e.g. index 2"),
    ],
)
def test_a_file_of_paraphrases_must_fit(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "p.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        paraphrase.from_file(path, ["1", "2"])


def test_answers_of_a_file_are_those_made_here(
    lab: Lab, analyse: Analyse, no_model: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    data, other = ("--data", "tiny_short", "--limit", "4"), lab.folder / "words.csv"
    other.write_text("index,question\n" + "".join(f"{i},What is it?\n" for i in range(1, 5)))
    words = ("analyse", "flips", "--method", "fastv", "--ratio", "0.25", "--count", "answer")
    here = analyse(*words, *data, "--paraphrases", str(other))
    changes = ["resized by +28 pixels", "paraphrase words.csv", "fastv 0.25", "fastv 0.25"]
    assert [row["change"] for row in here] == changes
    assert [row["against"] for row in here] == ["", "", *changes[:2]]
    assert {row["n"] for row in here} == {"4"}
    assert lab.eval("--method", "fastv", "--ratio", "0.25", *data) == 0
    stored = analyse("analyse", "flips", str(lab.csv), "--count", "answer", "--paraphrases", str(other))
    assert stored == here
    no_model()
    lab.csv.with_suffix(".runs.csv").write_text(
        lab.csv.with_suffix(".runs.csv").read_text().replace(",float32,", ",bfloat16,")
    )
    analyse("analyse", "flips", str(lab.csv), code=2)
    assert "dtype 'bfloat16', now 'float32'" in capsys.readouterr().err


def test_a_method_that_shrinks_the_picture_is_answered_alone_and_one_that_cannot_run_is_refused(
    analyse: Analyse, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("analyse", "flips", "--data", "tiny_short", "--limit", "2", "--method")
    rows = analyse(*words, "downsample", "fastv")
    assert {row["change"] for row in rows if row["against"]} == {"downsample 0.5", "fastv 0.5"}
    assert "answers failed" not in capsys.readouterr().out
    analyse(*words, "fastv", "prumerge", code=2)
    assert "prumerge 0.5 cannot run on this model" in capsys.readouterr().err
