"""`ivcp lab train NAME`: which settings and names there are, in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ivcp_eval.cli import main
from ivcp_eval.lab.training.command import NUMBERS, configuration
from ivcp_eval.lab.training.examples import Generated
from ivcp_eval.lab.training.part import default_config, part_names


@pytest.mark.parametrize("name", part_names())
def test_a_part_ships_a_whole_configuration(name: str) -> None:
    """What the loop and the examples read is there, and is what may be given."""
    config = yaml.safe_load(default_config(name).read_text(encoding="utf-8"))
    assert {*config, "distinct"} == {*NUMBERS, "kinds", "part"}
    assert all(kind.fits(config[key]) for key, kind in NUMBERS.items() if key in config)


@pytest.mark.parametrize("name", part_names())
def test_the_shipped_kinds_of_questions_are_there(name: str) -> None:
    """Of every kind an example of `tiny2`; of `tiny`, too, or a refusal that names what there is."""
    kinds = yaml.safe_load(default_config(name).read_text(encoding="utf-8"))["kinds"]
    for number, _ in enumerate(kinds):
        assert Generated("tiny2", kinds).training(number).answer
    if {*kinds} <= {"box", "list", "colour", "shape", "count"}:
        for number, _ in enumerate(kinds):
            assert Generated("tiny", kinds).training(number).answer
    else:
        with pytest.raises(ValueError, match=r"tiny have no questions of the kind .* of box, list, sum, colour"):
            Generated("tiny", kinds).training(0)


def test_a_file_says_what_differs(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("steps: 7\npart: {diverse: 0.0}\n")
    shipped, config = configuration("learnpruner", None), configuration("learnpruner", own)
    assert config["steps"] == 7
    assert config["part"] == {**shipped["part"], "diverse": 0.0}
    assert config["rate"] == shipped["rate"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("stepps: 7", "has stepps, which the training of learnpruner"), ("batch: 0", "batch must be a whole number"),
     ("part: {ratio: 0.1}", "has ratio, which")],
)  # fmt: skip
def test_what_is_no_setting_is_refused(tmp_path: Path, text: str, words: str) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(text)
    with pytest.raises(ValueError, match=words):
        configuration("learnpruner", own)


def test_an_unknown_name_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "train", "learnprunner"]) != 0
    assert "did you mean 'learnpruner'?" in capsys.readouterr().err
