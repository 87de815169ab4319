"""Real photographs the whole way: JSON -> convert_to_tsv.py -> VLMEvalKit -> predictions -> CSV -> compare.

The pictures are those that scikit-learn and matplotlib ship in their wheels; boxes were drawn by hand on them.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
import sklearn.datasets
from PIL import Image

from ivcp_eval.cli import main
from ivcp_eval.reports.table import read_samples
from tests.runs.conftest import Lab

REPOSITORY = Path(__file__).resolve().parents[3]
SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
MATPLOTLIB = Path(matplotlib.get_data_path()) / "sample_data"
# file -> [(expression, (x, y, width, height) in pixels)]
PHOTOGRAPHS: dict[Path, list[tuple[str, tuple[int, int, int, int]]]] = {
    SKLEARN / "china.jpg": [
        ("the pagoda with the golden roof", (10, 20, 560, 330)),
        ("the trees on the right", (560, 200, 75, 150)),
    ],
    SKLEARN / "flower.jpg": [
        ("the big flower", (150, 60, 330, 330)),
        ("the dark background on the left", (0, 0, 140, 426)),
    ],
    MATPLOTLIB / "grace_hopper.jpg": [("the woman in uniform", (60, 20, 420, 560)), ("her cap", (140, 20, 230, 130))],
}


def _mdetr(folder: Path) -> Path:
    """Hand-made annotations in MDETR's format, one entry of ``images`` per expression."""
    images, annotations = [], []
    for path, expressions in PHOTOGRAPHS.items():
        with Image.open(path) as image:
            width, height = image.size
            image.convert("RGB").save(folder / path.name, quality=95)
        for expression, box in expressions:
            number = len(images)
            entry = {"file_name": path.name, "height": height, "width": width, "id": number, "caption": expression}
            images.append({**entry, "original_id": number, "dataset_name": "refcoco"})
            area = box[2] * box[3]
            annotations.append({"id": number, "image_id": number, "bbox": list(box), "area": area, "category_id": 1})
    path = folder / "photographs.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))
    return path


YAML = """
kind: grounding
metrics: [{name: Acc@0.5, file: _acc.csv, column: Acc@0.5}]
samples: {file: _results.csv, column: hit}
cluster: image_id
"""


@pytest.mark.slow
def test_photographs_go_the_whole_way(
    lab: Lab,
    declared: Callable[[str, str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pictures = lab.folder / "pictures"
    pictures.mkdir()
    command = [
        *("convert_to_tsv.py", "--images_folder", str(pictures), "--annotations_files", str(_mdetr(pictures))),
        *("--output_dir", str(lab.folder / "LMUData"), "--allow-partial", "--workers", "1"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "convert_to_tsv.py"), run_name="__main__")
    assert not stop.value.code
    assert (lab.folder / "LMUData" / "photographs.tsv").is_file()

    declared("photographs", YAML, "").unlink()  # its TSV is the converter's, in the data root
    assert lab.eval("--data", "photographs", "--ratio", "0.25") == 0
    rows = {(row["method"], row["metric"]): row for row in lab.rows()}
    baseline, pruned = rows["none", "Acc@0.5"], rows["ivc_prune", "Acc@0.5"]
    assert baseline["n_samples"] == pruned["n_samples"] == 6
    assert pruned["ratio_kept_final"] == pytest.approx(0.25, abs=0.01)
    samples = read_samples(lab.csv.parent / pruned["predictions"])
    # The real pictures are resized to multiples of 28: 640x427 becomes 644x420, 23 x 15 visual tokens.
    assert {sample["visual_tokens"] for sample in samples} >= {23 * 15}

    assert main(["compare", str(lab.csv), str(lab.csv), "--output", str(lab.folder / "comparison.csv")]) == 0
    assert "Acc@0.5" in capsys.readouterr().out
    assert (lab.folder / "comparison.csv").is_file()
