"""``ivcp tune``: the space, the race, the front, and which rows are never touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ivcp_eval.lab.tiny.build_benchmarks import content
from ivcp_eval.runs.analysis import tune
from ivcp_eval.runs.analysis.study import Study
from tests.runs.analysis.conftest import Analyse
from tests.runs.conftest import Lab

SETTINGS = tune.Settings("flops", 0.5, ("ivc_prune", "pyramiddrop", "visionzip"))


def test_the_space_has_layers_schedules_and_levels() -> None:
    found = tune.entries(SETTINGS, 28)
    grids: dict[str, list[Any]] = {}
    for entry in found:
        grids.setdefault(entry["method"], []).append(entry["parameters"])
        assert entry["ratios"] == [0.5, 0.425, 0.35, 0.275]
    assert grids["ivc_prune"] == [{"layer": [1, 5, 8, 12, 16, 20, 23, 27]}, {}]
    staged, own = grids["pyramiddrop"]
    assert [0.25, 0.4375, 0.625, 0.8125] in staged["depths"]
    assert (len(staged["depths"]), own, grids["visionzip"]) == (12, {}, [{}])
    assert tune.entries(SETTINGS, 4, first_cut=2)[0]["parameters"]["layer"] == [2, 3]
    assert tune.entries(replace(SETTINGS, layers=(9, 3)), 28)[0]["parameters"]["layer"] == [3, 9]


@pytest.mark.parametrize(
    ("text", "found"),
    [("flops=0.5", ("flops", 0.5)), ("tokens=.25", ("layer_mean", 0.25)), ("final=1", ("final", 1.0))],
)
def test_budgets(text: str, found: tuple[str, float]) -> None:
    assert tune.budget(text) == found


@pytest.mark.parametrize("text", ["flops", "flops=", "time=0.5", "0.5"])
def test_another_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not KIND=SHARE with KIND one of tokens"):
        tune.budget(text)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        tune.Settings("flops", 1.0, ("fastv",))
    with pytest.raises(ValueError, match="the last as many or more"):
        tune.Settings("flops", 0.5, ("fastv",), first=8, samples=4)


def test_one_in_eta_of_each_level_goes_on_and_ties_fall_to_the_first() -> None:
    race: list[Any] = [
        SimpleNamespace(level=level, score=score, name=name)
        for level, score, name in [(0.5, 70, "a"), (0.4, 10, "b"), (0.5, 90, "c"), (0.5, 90, "d"), (0.5, 20, "e")]
    ]
    assert [one.name for one in tune.halved(race, 3)] == ["c", "d", "b"]


def test_the_front_has_who_is_not_beaten() -> None:
    points = [(0.5, 90.0), (0.4, 90.0), (0.4, 80.0), (0.3, 70.0), (0.6, 95.0), (0.3, 70.0)]
    assert tune.front(points) == [False, True, False, True, True, True]


def test_a_split_by_hash_is_stable_and_near_its_share() -> None:
    inside = {str(i) for i in range(2000) if tune.is_validation(str(i), 0.3)}
    assert len(inside) == pytest.approx(600, abs=60)
    assert inside < {str(i) for i in range(2000) if tune.is_validation(str(i), 0.5)}
    # The first 8 bytes of the SHA-256 of "0", 5f ec eb 66 ..., are 0.37 of their range.
    assert [tune.is_validation("0", share) for share in (0.37, 0.38)] == [False, True]


def test_a_race_on_generated_scenes(lab: Lab, analyse: Analyse, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        *("tune", "--budget", "tokens=0.6", "--methods", "fastv", "visionzip", "--layers", "2", "4", "7"),
        *("--first", "2", "--samples", "4", "--eta", "2"),
    )
    rows = analyse(*words)
    whole, *others = rows
    assert (whole["candidate"], whole["front"], float(whole["layer_mean"])) == ("unpruned", "", 1.0)
    # A cut at layer 7 of 8 cannot hold any level; layer 4 only the highest two, 0.6 and 0.51.
    assert len(others) == 4 + 2 + 4
    assert {row["n"] for row in others if row["front"]} == {"4"}
    assert {row["n"] for row in others if not row["front"]} == {"2"}
    for row in others:
        assert float(row["layer_mean"]) == pytest.approx(float(row["asked"]), abs=0.01)
        assert float(row["asked"]) <= 0.6
    assert "yes" in {row["front"] for row in others}
    made = json.loads((lab.folder / "table.json").read_text())["settings"]
    assert made["rungs"] == [2, 4]
    assert any("layer=7" in reason and "needs an earlier cut" in reason for reason in made["left_out"])
    assert "generated validation scenes, 300 rows" in made["split"]
    assert (lab.folder / "table.png").read_bytes().startswith(b"\x89PNG")
    validation = list((lab.folder / "work" / "validation").glob("*.tsv"))
    assert [path.read_bytes() for path in validation] == [content("tiny_grounding.tsv", "validation")]

    def answered(*_: Any) -> None:
        raise AssertionError("a sample was answered again")

    monkeypatch.setattr(Study, "_made", answered)
    assert analyse(*words) == rows


def test_rows_that_are_held_out_are_never_asked(
    analyse: Analyse, declared: Callable[[str, str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = content("tiny_short.tsv", "validation").decode().splitlines()[:31]
    yaml = "kind: short_answer\nprompt: dataset\nfile: own.tsv\ncluster: image_id\n"
    yaml += 'metrics: [{name: accuracy, file: "_acc.csv", column: Overall}]\n'
    yaml += 'samples: {file: "_results.csv", column: eval_score}\n'
    declared("own", yaml, "\n".join(lines) + "\n")
    pictures = {line.split("\t")[0]: line.split("\t")[-1] for line in lines[1:]}
    asked: set[str] = set()
    before = Study.answers

    def answers(self: Study, question: Any, *rest: Any) -> Any:
        asked.add(question.index)
        return before(self, question, *rest)

    monkeypatch.setattr(Study, "answers", answers)
    words = ("tune", "--data", "own", "--budget", "final=0.5", "--methods", "random", "--first", "2")
    analyse(*words, "--validation-share", "0.4")
    wanted = {index for index, picture in pictures.items() if tune.is_validation(picture, 0.4)}
    assert 0 < len(wanted) < len(pictures)
    assert asked == wanted
