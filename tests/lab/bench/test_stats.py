"""The bench of comparisons times what it says: every variant, paired."""

from __future__ import annotations

import csv
import json

import pytest

from ivcp_eval.lab.bench import stats
from ivcp_eval.reports.compare import compare


@pytest.mark.parametrize("graded", [False, True])
def test_what_is_compared(tmp_path, graded: bool) -> None:
    rows = compare(stats.written(tmp_path, 6, 80, graded), resamples=50).rows
    assert len(rows) == 6
    assert all(row.paired and row.n_samples == 80 and row.n_clusters == (80 if graded else 40) for row in rows)
    assert any(row.graded for row in rows) == graded


def test_the_verb(tmp_path, capsys, monkeypatch) -> None:
    command = ["--variants", "2", "--samples", "60", "--resamples", "20", "--check", "--out", str(tmp_path / "s")]
    assert stats.main(command) == 0
    assert "elapsed s" in capsys.readouterr().out
    with (tmp_path / "s.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["variants"], row["samples"], row["met"]) for row in rows] == 2 * [("2", "60", "True")]
    assert all(min(float(row["cpu_s"]), float(row["elapsed_s"])) > 0 for row in rows)
    assert all(float(row["load"]) >= 0 for row in rows)
    noted = json.loads((tmp_path / "s.json").read_text())
    assert (noted["command"], len(noted["rows"])) == (f"ivcp bench stats {' '.join(command)}", 2)
    monkeypatch.setattr(stats, "TARGET_S", 0.0)
    assert stats.main(command) == 1, "too slow"
