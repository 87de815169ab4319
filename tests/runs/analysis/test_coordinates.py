"""``ivcp analyse coordinates``: what each selection keeps, which tokens show a box, and a table that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ivcp_eval.interface import ImageSpan, Unsupported
from ivcp_eval.runs.analysis.coordinates import CONDITIONS, covered, kept_tokens
from tests.runs.analysis.conftest import Analyse
from tests.runs.conftest import Lab


def test_every_selection_keeps_what_it_says() -> None:
    n, target, ivc = 100, np.arange(40, 50), np.arange(45, 65)
    kept = kept_tokens(n, target, ivc, np.random.default_rng(3))
    sets = {name: set(tokens.tolist()) for name, tokens in kept.items()}
    assert set(sets) == set(CONDITIONS)
    assert all((np.diff(tokens) > 0).all() for tokens in kept.values())
    goal, stripes, everything = set(target.tolist()), set(ivc.tolist()), set(range(n))
    assert sets["target only"] == goal
    assert sets["target + IVC"] == goal | stripes
    assert sets["all but IVC"] == everything - stripes
    assert sets["all but IVC outside the target"] == everything - (stripes - goal)
    for name, reference in (
        ("target + as many", "target + IVC"),
        ("all but as many", "all but IVC"),
        ("all but as many outside the target", "all but IVC outside the target"),
    ):
        assert len(sets[name]) == len(sets[reference])
        assert sets[name] != sets[reference]
    assert goal <= sets["target + as many"] & sets["all but as many outside the target"]
    for name, size, of_target in (
        ("target + random background, 0.5", 50, 10),
        ("target + random background, 0.25", 25, 10),
        ("half of the target + random background, 0.5", 50, 5),
    ):
        assert (len(sets[name]), len(sets[name] & goal)) == (size, of_target)
    again = kept_tokens(n, target, ivc, np.random.default_rng(3))
    assert all(np.array_equal(kept[name], again[name]) for name in kept)


def test_tokens_of_a_box_in_a_grid_and_in_tiles() -> None:
    grid = ImageSpan(torch.arange(12), grid=(3, 4))
    assert covered(grid, (0.25, 0.0, 0.5, 1 / 3)).tolist() == [1]
    assert covered(grid, (0.3, 0.3, 0.6, 0.4)).tolist() == [1, 2, 5, 6]
    tiled = ImageSpan(torch.arange(12), tiles=(2, 1), views=(4, 4, 4))
    # The right half's upper left token, and the thumbnail's upper right one.
    assert covered(tiled, (0.5, 0.0, 0.75, 0.5)).tolist() == [4, 9]
    with pytest.raises(Unsupported, match="neither one grid nor square tiles"):
        covered(ImageSpan(torch.arange(12), views=(6, 6)), (0, 0, 1, 1))


def test_the_table_is_what_was_kept_and_goes_on(lab: Lab, analyse: Analyse, no_model: Callable[[], None]) -> None:
    words = ("analyse", "coordinates", "--methods", "ivc_prune", "--limit", "2")
    rows = {row["condition"]: row for row in analyse(*words)}
    assert list(rows) == ["unpruned", "ivc_prune 0.5", *CONDITIONS]
    assert {row["n"] for row in rows.values()} == {"2"}
    assert {row["failed"] for row in rows.values()} == {"0"}
    number = {name: (float(row["kept"]), float(row["recall"])) for name, row in rows.items()}
    assert number["unpruned"] == (100, 100)
    assert number["target only"][1] == number["target + IVC"][1] == 100
    assert number["all but IVC outside the target"][1] == 100 > number["all but IVC"][1]
    assert 45 < number["half of the target + random background, 0.5"][1] < 70
    assert number["ivc_prune 0.5"][0] == pytest.approx(50, abs=1)
    assert number["target + as many"] == number["target + IVC"]
    assert rows["all but IVC"]["against"] == "all but as many"
    made = json.loads((lab.folder / "table.json").read_text())
    assert made["settings"]["layer"] == 2, "the checkpoint's own layer for the first of the methods"
    assert made["model"]["variant"]["method"] == "none"
    no_model()
    assert {row["condition"]: row for row in analyse(*words)} == rows


def test_questions_of_ones_own(lab: Lab, analyse: Analyse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMUData", str(tmp_path / "data"))
    Image.new("RGB", (168, 168), "red").save(tmp_path / "red.png")
    line = {"image": "red.png", "question": "red square", "answer": [10, 10, 90, 90]}
    (tmp_path / "mine.jsonl").write_text(f"{json.dumps(line)}\n" * 4, encoding="utf-8")
    own = str(tmp_path / "mine.jsonl")
    rows = analyse("analyse", "coordinates", "--data", own, "--methods", "ivc_prune")
    assert {row["n"] for row in rows} == {"4"}
    flips = analyse("analyse", "flips", "--data", own, "--method", "fastv")
    assert {row["benchmark"] for row in flips} == {"mine"}
    assert analyse(
        "tune",
        "--data",
        own,
        "--budget",
        "final=0.5",
        "--methods",
        "fastv",
        "--validation-share",
        "0.99",
        "--first",
        "2",
        "--samples",
        "2",
    )


def test_a_benchmark_without_boxes_is_refused(analyse: Analyse, capsys: pytest.CaptureFixture[str]) -> None:
    analyse("analyse", "coordinates", "--data", "tiny_mcq", "--limit", "1", code=2)
    assert "name a grounding benchmark" in capsys.readouterr().err
