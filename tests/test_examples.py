"""The notebook for newcomers runs from top to bottom, and is stored without what it printed."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "examples" / "prune_show_compare.ipynb"


def test_no_output_is_stored() -> None:
    """So that running it changes nothing in the repository; execute it to see its tables and pictures."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 6
    assert all(cell["outputs"] == [] and cell["execution_count"] is None and not cell["metadata"] for cell in code)


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    for name in ("LMUData", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    asked, pruned, shown, *codes = [out["data"] for outputs in cells for out in outputs if "data" in out]
    assert asked["text/plain"] == "'Yes'"
    assert "60 of 121 visual tokens kept" in pruned["text/plain"]
    assert {"image/png", "image/svg+xml"} <= shown.keys()
    assert [code["text/plain"] for code in codes] == ["0", "0", "3"]
    tables, table, verdicts = (
        "".join(out["text"] for out in outputs if out.get("name") == "stdout") for outputs in cells[3:]
    )
    assert "results: " in tables
    for method in ("ivc_prune", "fastv", "uniform", "again"):
        assert f"{method} " in table
    assert "A/A: difference of the unpruned model's second answers" in table
    assert "UNDECIDED" in verdicts
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60, "seconds of CPU"
