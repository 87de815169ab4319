"""Times: which samples, in which order, paired with the baseline of the same round."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ivcp_eval.interface.variants import Variant
from ivcp_eval.reports.stats.timing import read_timings, time_ratios
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.answering.timing import FILE, Times, is_timed, time_cells, times_of
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import load
from ivcp_eval.vlmeval_bridge import register
from tests.runs.conftest import Bench


@pytest.fixture
def material(bench: Bench) -> tuple[Any, list[Any], Session]:
    """A data set of five rows, its cells under three variants, and the model."""
    register()
    from ivcp_eval.vlmeval_bridge.evaluate import build

    plan = make(load(bench.spec), bench.folder / "runs")
    model = plan.models["tiny"]
    benchmark, cells = model.groups["tiny_mcq"]
    session = Session(model.weights, model.placement, model.limits)
    return build(benchmark, 5), [cells[0], cells[1], cells[4]], session


def test_every_sample_runs_under_all_variants_in_turn(
    material: tuple[Any, list[Any], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, cells, session = material
    ran: list[tuple[str, str]] = []

    def fake(self: Session, parts: Any, variant: Variant) -> Times:
        ran.append((parts[-1]["text"], variant.method))
        return Times(1.0, 10.0 * len(ran), None, 5.0)

    monkeypatch.setattr(Session, "time", fake)
    assert time_cells(session, dataset, cells, n=3) == 3
    methods = [method for _, method in ran]
    forward = ["none", "ivc_prune", "downsample"]
    assert methods == forward + forward + forward[::-1] + forward, "one untimed round, then there and back"
    first, second = (read_timings(cell.folder / FILE) for cell in cells[:2])
    assert first is not None
    assert second is not None
    assert first.session == second.session != ""
    own, baseline = times_of(cells[1]), times_of(cells[0])
    assert list(own) == [str(dataset.data.iloc[i]["index"]) for i in (0, 2, 4)], "evenly spread"
    assert [times.prefill_ms for times in own.values()] == [50.0, 80.0, 110.0]
    assert [times.prefill_ms for times in baseline.values()] == [40.0, 90.0, 100.0]
    assert time_ratios(first, second)["decode"].n == 0, "nothing was decoded"
    assert time_ratios(first, second)["prefill"].n == 3


def test_a_sample_that_fails_is_left_out_for_all(
    material: tuple[Any, list[Any], Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, cells, session = material
    bad = str(dataset.data.iloc[2]["question"])

    def fake(self: Session, parts: Any, variant: Variant) -> Times:
        if bad in parts[-1]["text"] and variant.method == "downsample":
            raise RuntimeError("a kernel gave up")
        return Times(None, 1.0, 1.0, 3.0)

    monkeypatch.setattr(Session, "time", fake)
    left = len({str(row["question"]) for row in dataset.data.to_dict("records") if bad not in str(row["question"])})
    assert 0 < left < 5, "the test proves nothing"
    n = time_cells(session, dataset, cells, n=50)
    assert n == sum(bad not in str(q) for q in dataset.data["question"])
    assert {len(times_of(cell)) for cell in cells} == {n}
    assert time_cells(session, dataset, cells, n=0) == 0


def test_real_times_and_their_ratio(
    material: tuple[Any, list[Any], Session], capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, cells, session = material
    assert time_cells(session, dataset, cells, n=2) == 2
    for cell in cells:
        for own in times_of(cell).values():
            assert own.vision_ms is not None
            assert own.decode_ms_per_token is not None
            assert 0 < own.vision_ms + own.prefill_ms + own.decode_ms_per_token < own.end_to_end_ms
    found = time_ratios(*(read_timings(cell.folder / FILE) for cell in cells[:2]))["end_to_end"]
    assert found.n == 2
    assert found.ratio > 0
    path = cells[1].folder / FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "samples": [{"index": "1"}]}))
    with pytest.raises(ValueError, match="damaged"):
        times_of(cells[1])


def test_cells_without_times_have_none() -> None:
    cell: Any = SimpleNamespace(folder=Path("nowhere"), load_record=lambda: None)
    assert times_of(cell) == {}
    assert not is_timed(cell, 1)
    cell.load_record = lambda: {"status": "skipped"}
    assert is_timed(cell, 1), "its model cannot run it"
