"""The bench of comparisons times what it says: every variant, paired."""

from __future__ import annotations

import pytest

from ivcp_eval.lab.bench import stats
from ivcp_eval.reports.compare import compare


@pytest.mark.parametrize("graded", [False, True])
def test_what_is_compared(tmp_path, graded: bool) -> None:
    rows = compare(stats.written(tmp_path, 6, 80, graded), resamples=50).rows
    assert len(rows) == 6
    assert all(row.paired and row.n_samples == 80 and row.n_clusters == (80 if graded else 40) for row in rows)
    assert any(row.graded for row in rows) == graded


def test_the_verb(capsys) -> None:
    assert stats.main(["--variants", "2", "--samples", "60", "--resamples", "20"]) == 0
    assert "2 variants, 60 samples" in capsys.readouterr().out
