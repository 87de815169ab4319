"""The converter against the two straightforward ones: same content, much smaller (times are for the benchmark)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from ivcp_eval.bench_refcoco import convert_by_copying, convert_by_reencoding, convert_with_package, main, make_corpus
from tests.refcoco_data import image_cells


def test_same_content_in_less_space(tmp_path: Path) -> None:
    annotations = make_corpus(tmp_path, images=6, expressions=40)
    ours, copied, again = (
        converter(annotations, tmp_path, 1)
        for converter in (convert_with_package, convert_by_copying, convert_by_reencoding)
    )
    frames = [pd.read_csv(path, sep="\t") for path in (ours, copied)]
    for column in ("index", "question", "width", "height"):
        assert frames[0][column].tolist() == frames[1][column].tolist()
    assert image_cells(frames[0].to_dict("records")) == image_cells(frames[1].to_dict("records"))
    assert sum(len(str(cell)) > 64 for cell in frames[0]["image"]) == 6
    for other in (copied, again):
        assert other.stat().st_size > 2.5 * ours.stat().st_size


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", "4", "--expressions", "24", "--workers", "2", "--folder", str(tmp_path)]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "re-encode",
        "copy",
        "package, 1 process",
        "package, 2 processes",
    ]
    assert list(tmp_path.iterdir()) == []
