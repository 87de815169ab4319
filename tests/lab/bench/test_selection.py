"""Selection costs: a slow choice is found where it is, savings are the cut's, no method is left out in silence."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivcp_eval.engine.cost import clock
from ivcp_eval.interface import Cut, Signals, registry
from ivcp_eval.lab.bench import pruning as bench
from ivcp_eval.lab.bench.kept import Calls
from ivcp_eval.lab.bench.models import build_model, configuration, size
from ivcp_eval.lab.bench.selection import Candidate, Timed, _row, measure_selection

SLOW_S = 0.06
CALLS = Calls(None, {}, resume=False)


def _setup(**depths: int) -> bench.Setup:
    model = build_model(configuration(size("tiny"), **depths), "cpu", torch.float32, "sdpa")
    return bench.Setup(model, registry.adapter("qwen2_5_vl"), size("tiny"), "cpu", "sdpa", torch.float32, cpu_time=True)


def test_a_slow_choice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = registry.method_class("fastv")
    score = kind.score  # type: ignore[attr-defined]

    def slow(self: Any, signals: Signals) -> Tensor:
        end = time.process_time() + SLOW_S
        while time.process_time() < end:
            pass
        found: Tensor = score(self, signals)
        return found

    monkeypatch.setattr(kind, "score", slow)
    rows = {row["variant"]: row for row in measure_selection(_setup(), 64, 2, 60, ["fastv", "random"], CALLS)}
    assert list(rows) == ["none", "fastv", "random"]
    found = rows["fastv"]
    assert found["rounds"] == 2
    assert found["layers"] == "2"
    # Two rows, each chosen for on its own.
    assert 2e3 * SLOW_S < found["select_ms"] < 2e3 * SLOW_S + 60
    assert found["selection_ms"] > 2e3 * SLOW_S - 30
    assert found["net_ms"] < -2e3 * SLOW_S + 60
    assert found["saved_ms"] > -60, "the waste is not the cut's"
    assert rows["random"]["select_ms"] < 1e3 * SLOW_S


def test_a_method_that_cannot_run_is_a_row_with_its_reason() -> None:
    (baseline, reason) = measure_selection(_setup(layers=2), 64, 1, 60, ["fastv"], CALLS)
    assert baseline["variant"] == "none"
    assert (reason["variant"], reason["visual_tokens"]) == ("fastv", 64)
    assert "layer 2 of method 'fastv' is outside 0..1" in reason["note"]


def _rounds(*totals: float) -> list[Timed]:
    return [Timed(5.0, total - 5.0, 1.5) for total in totals]


def test_differences_are_taken_round_by_round() -> None:
    cuts = (Cut(0, 1.0), Cut(2, 0.5), Cut(4, 0.25))
    rounds = {"none": _rounds(100, 200, 300), "cut alone": _rounds(60, 160, 260), "some": _rounds(67, 166, 270)}
    row = _row(Candidate("some", cuts), rounds)
    assert row["layers"] == "2 4"
    assert (row["saved_ms"], row["selection_ms"], row["net_ms"], row["select_ms"]) == (40, 7, 33, 1.5)
    whole = _row(Candidate("some", ()), rounds)
    assert (whole["saved_ms"], whole["selection_ms"]) == (0, -33)
    small = _row(Candidate("some", (), 0.5), rounds)
    assert (small["saved_ms"], small["net_ms"]) == (33, 33)
    assert "select_ms" not in small


def test_calls_are_timed_one_by_one() -> None:
    with clock.call_time(nn.Linear(1, 1)) as watch:
        assert watch.around(lambda x: (time.sleep(0.01), x)[1])(3) == 3
        watch.around(time.sleep)(0.03)
    assert len(watch.ms) == 2
    assert watch.ms[0] >= 10
    assert watch.ms[1] >= 30


def test_every_method_is_part_of_the_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "tiny", "--threads", "1", "--rounds", "1", "--only-methods", "--out", str(tmp_path / "made")]
    assert bench.main(options) == 0
    rows = json.loads((tmp_path / "made.json").read_text())["rows"]
    assert {row["variant"] for row in rows} == set(registry.method_names())
    assert {row["variant"] for row in rows if "no class token" in row.get("note", "")} == {"prumerge", "prumerge_plus"}
    idle = ("none", "again", "deployed", "downsample", "fastocr", "adaspark")
    chooses = [row for row in rows if row["variant"] not in idle and "rounds" in row]
    assert all(row["select_ms"] > 0 for row in chooses)
    assert "selection ms" in capsys.readouterr().out
    header = (tmp_path / "made.csv").read_text().splitlines()[0].split(",")
    assert {"layers", "select_ms", "selection_ms", "saved_ms", "net_ms"} <= set(header)


def test_a_misspelt_method_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="did you mean 'fastv'"):
        bench.main(["--size", "tiny", "--methods", "fastw"])
