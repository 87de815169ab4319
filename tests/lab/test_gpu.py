"""`ivcp lab gpu`: cells that end in time and resume, and every stage for real on small shapes."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from ivcp_eval.lab import gpu

QUICK = "import sys; open(sys.argv[1] + '.ran', 'a').write('x')"


def _cell(name: str, code: str, **options: object) -> gpu.Cell:
    return gpu.Cell("try", name, (sys.executable, "-c", code, "OUT"), 30, **options)  # type: ignore[arg-type]


def _run(out: Path, *more: str) -> int:
    return gpu.main(["--device", "cpu", "--profile", "dry", "--out", str(out), *more])


def test_cells_fail_alone_and_finished_ones_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [
        _cell("fine", QUICK),
        _cell("broken", "raise SystemExit(3)"),
        _cell("absent", QUICK, needs=("no_such_module",)),
        _cell("after", QUICK),
    ]
    monkeypatch.setattr(gpu, "cells", lambda *_: iter(cells))
    assert _run(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "broken: exit code 3, see broken.log" in shown
    assert "absent: left out: no_such_module not found here" in shown
    assert "3 of 4 cells need no other run; 1 failed" in shown
    cells[1] = _cell("broken", QUICK)
    assert _run(tmp_path) == 0
    assert {name: (tmp_path / f"{name}.ran").read_text() for name in ("fine", "broken", "after")} == {
        "fine": "x",
        "broken": "x",
        "after": "x",
    }
    done = json.loads((tmp_path / "after.done.json").read_text())
    assert (done["code"], done["cell"]) == (0, "after")
    assert done["command"].startswith("python -c ")


def test_time_is_kept_and_what_is_left_runs_in_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = "import time; time.sleep(60)"
    monkeypatch.setattr(gpu, "START_S", 0.5)
    cells = [_cell("slow", slow), _cell("never", QUICK)]
    monkeypatch.setattr(gpu, "cells", lambda *_: iter(cells))
    assert _run(tmp_path, "--minutes", "0.02") == 75
    assert "stopped after" in json.loads((tmp_path / "slow.done.json").read_text())["note"]
    assert not (tmp_path / "never.ran").exists()
    cells[0] = _cell("slow", QUICK)
    assert _run(tmp_path) == 0
    assert (tmp_path / "never.ran").exists()


def test_a_cell_that_goes_on_is_finished_by_what_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = "import sys, pathlib; f = pathlib.Path(sys.argv[1]); f.mkdir(exist_ok=True)"
    monkeypatch.setattr(gpu, "cells", lambda *_: iter([_cell("train", half, until="model")]))
    assert _run(tmp_path) == 75
    monkeypatch.setattr(
        gpu, "cells", lambda *_: iter([_cell("train", half + "; (f / 'model').mkdir()", until="model")])
    )
    assert _run(tmp_path) == 0


def test_other_settings_need_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cells", lambda *_: iter([_cell("fine", QUICK)]))
    assert _run(tmp_path) == 0
    with pytest.raises(ValueError, match="choose another --out"):
        gpu.main(["--device", "cpu", "--profile", "full", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="no stage polish; there are try"):
        _run(tmp_path, "--stages", "polish")


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--device cpu --profile dry"):
        gpu.main(["--out", str(tmp_path)])


@pytest.mark.parametrize("stage", ["contract", "bench", "fork", "throughput", "train"])
def test_every_stage_runs_on_small_shapes(stage: str, tmp_path: Path) -> None:
    assert _run(tmp_path, "--stages", stage) == 0
    cells = [cell for cell in gpu.cells(gpu.PROFILES["dry"], "cpu", 8) if cell.stage == stage]
    assert cells
    for cell in cells:
        done = json.loads((tmp_path / f"{cell.name}.done.json").read_text())
        assert (done["code"], done["note"]) == (0, ""), (tmp_path / f"{cell.name}.log").read_text()[-2000:]
    if stage == "throughput":
        rows = list(csv.DictReader((tmp_path / "throughput_2.csv").open()))
        assert [(row["method"], float(row["ratio"])) for row in rows] == [
            ("none", 1),
            ("ivc_prune", 0.5),
            ("ivc_prune", 0.25),
        ]
        assert all(float(row["requests_per_s"]) > 0 and int(row["batch"]) == 2 for row in rows)
        assert float(rows[0]["end_to_end_ratio"]) == 1
        assert float(rows[1]["kv_bytes"]) < float(rows[0]["kv_bytes"])
    if stage == "contract":
        assert 'tests="4"' in (tmp_path / "contract_bfloat16_sdpa.xml").read_text()


def test_the_full_profile_asks_for_what_the_bench_knows() -> None:
    """Every command of the full profile is understood by its own parser."""
    from ivcp_eval.lab.bench import fork, pruning, throughput
    from ivcp_eval.lab.tiny2.training.train import CONFIGS

    parsers = {"pruning": pruning.parser(), "fork": fork.parser(), "throughput": throughput.parser()}
    cells = list(gpu.cells(gpu.PROFILES["full"], "cuda", 8))
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        arguments = list(cell.command[3:])
        if cell.stage in ("bench", "fork", "throughput"):
            assert arguments[0] == "bench"
            parsers[arguments[1]].parse_args(arguments[2:])
        elif cell.stage == "train":
            assert (CONFIGS / "gpu.yaml").exists()
