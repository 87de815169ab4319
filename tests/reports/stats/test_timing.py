"""Times are compared sample by sample within one session, and a slower variant is said to be slower."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.stats.timing import paired_ratio, read_timings
from ivcp_eval.reports.table import make_row, write_results, write_samples
from ivcp_eval.reports.wide import write_tables

N = 16


def timings(factor: float, session: str = "s", noise: float = 0.02) -> dict[str, Any]:
    draw = np.random.default_rng(round(100 * factor))
    samples = []
    for index in range(N):
        size = 50 + 30 * index  # samples differ far more than variants do
        times = {name: size * factor * math.exp(noise * draw.normal()) for name in ("prefill_ms", "end_to_end_ms")}
        samples.append({"index": str(index), "vision_ms": 5.0, "decode_ms_per_token": None, **times})
    return {"session": session, "samples": samples}


def write(folder: Path, **sides: dict[str, Any]) -> Path:
    rows = []
    for method, content in sides.items():
        (folder / method).mkdir()
        (folder / method / "timing.json").write_text(json.dumps(content))
        write_samples(folder / method / "predictions.csv", [{"index": i, "score": 1} for i in range(N)])
        rows.append(
            make_row(
                **{"model": "tiny", "method": method, "benchmark": "dev", "metric": "accuracy", "status": "ok"},
                **{"score": 100, "score_scale": 100, "ratio_asked": 1.0 if method == "none" else 0.5, "n_samples": N},
                **{"run_id": method, "predictions": f"{method}/predictions.csv"},
                prefill_ms_median=1.0 if method == "none" else 0.1,
            )
        )
    write_results(folder / "r.csv", rows)
    return folder / "r.csv"


def test_the_ratio_is_students_interval_of_the_logarithms() -> None:
    before = {str(i): 10.0 + i for i in range(9)}
    after = {str(i): (10 + i) * (0.7 + 0.02 * i) for i in range(10)}
    found = paired_ratio(before, after)
    logs = np.log([0.7 + 0.02 * i for i in range(9)])
    low, high = scipy_stats.t.interval(0.95, 8, logs.mean(), scipy_stats.sem(logs))
    assert (found.ratio, found.low, found.high) == pytest.approx(tuple(np.exp([logs.mean(), low, high])))
    assert found.n == 9
    assert math.isnan(paired_ratio(before, {"3": 5.0}).low)
    assert paired_ratio(before, {}).n == 0


def test_a_slower_variant_is_said_to_be_slower(tmp_path: Path) -> None:
    comparison = compare(write(tmp_path, none=timings(1), fastv=timings(0.8), random=timings(1.2)))
    faster, slower = comparison.rows
    assert faster.times["prefill"].high < 1 < slower.times["prefill"].low
    assert faster.times["prefill"].ratio == pytest.approx(0.8, abs=0.03)
    assert slower.times["prefill"].ratio == pytest.approx(1.2, abs=0.03)
    assert faster.times["prefill"].n == N
    assert faster.times["decode"].n == 0, "not measured"
    text = comparison.to_terminal(999)
    assert "Slower than the baseline: tiny dev random 0.5, prefill: 1." in text
    assert "fastv 0.5, prefill" not in text
    assert "decode time" not in text
    assert "16 samples" in text
    assert faster.record()["prefill_time_low"] == faster.times["prefill"].low


def test_a_sweeps_tables_show_the_same_times(tmp_path: Path) -> None:
    """Ratio, interval and n of the comparison, in the printed table, in Markdown, LaTeX and CSV."""
    path = write(tmp_path, none=timings(1), fastv=timings(0.8), random=timings(1.2))
    faster, slower = (row.times["prefill"] for row in compare(path).rows)
    (table,) = write_tables(path)
    cells = [f"{time.ratio:.2f}x [{time.low:.2f}, {time.high:.2f}]" for time in (faster, slower)]
    written = (tmp_path / "r" / "tiny.md").read_text(), (tmp_path / "r" / "tiny.tex").read_text()
    for text in (table.to_terminal(999), *written):
        assert cells[0] in text
        assert f"{cells[1]} slower" in text
        assert "one session, 16 samples" in text
        assert "decode  " not in text, "not measured"
    with (tmp_path / "r" / "tiny.csv").open(newline="") as stream:
        unpruned, line, _ = csv.DictReader(stream)
    columns = [f"dev prefill time{part}" for part in ("", " low", " high", " n")]
    assert [float(line[name]) for name in columns] == pytest.approx(
        [faster.ratio, faster.low, faster.high, N], rel=1e-5
    )
    assert [line["dev decode time"], unpruned["dev prefill time"]] == ["", ""]


def test_times_of_another_session_are_not_compared(tmp_path: Path) -> None:
    (row,) = compare(write(tmp_path, none=timings(1), fastv=timings(0.8, session="another"))).rows
    assert all(time.n == 0 for time in row.times.values())


def test_a_sample_timed_again_counts_once(tmp_path: Path) -> None:
    content = {"session": "s", "samples": [{"index": "1", "prefill_ms": time} for time in (10, 40)]}
    (tmp_path / "timing.json").write_text(json.dumps(content))
    found = read_timings(tmp_path / "timing.json")
    assert found is not None
    assert found.samples["1"]["prefill_ms"] == pytest.approx(20)


@pytest.mark.parametrize("content", ["", "[]", '{"session": "s"}', '{"session": "s", "samples": [1]}'])
def test_a_broken_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "timing.json").write_text(content)
    with pytest.raises(ValueError, match=r"timing\.json is damaged .* remove it"):
        read_timings(tmp_path / "timing.json")
    assert read_timings(tmp_path / "none.json") is None
