"""A laboratory: the tiny model with random weights, and a folder of its own for every test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ivcp_eval.cli import main
from ivcp_eval.reports.table import Row, read_results


@dataclass(frozen=True)
class Lab:
    """Where a test's model, cells and results are, and a way to call ``ivcp eval`` there."""

    model: Path
    folder: Path

    @property
    def csv(self) -> Path:
        """The results file."""
        return self.folder / "out" / "results.csv"

    def arguments(self, *more: str) -> list[str]:
        """The command line of a small run with equal bytes for equal runs."""
        common = ["--model", "tiny", "--model-path", str(self.model), "--runs", str(self.folder / "runs")]
        return ["eval", *common, "--output", str(self.csv), "--max-new-tokens", "6", "--no-timing", *more]

    def eval(self, *more: str) -> int:
        """Run it in this process; the exit code."""
        return main(self.arguments(*more))

    def rows(self) -> list[Row]:
        """The results."""
        return read_results(self.csv)


@pytest.fixture
def lab(random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A fresh laboratory whose VLMEvalKit data root is its own."""
    monkeypatch.setenv("LMUData", str(tmp_path / "LMUData"))
    (tmp_path / "LMUData").mkdir()
    return Lab(random_model, tmp_path)


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], Path]:
    """Declare a benchmark of the test's own: (name, yaml, tsv text) -> path of the TSV."""
    from ivcp_eval import benchmarks

    folder = tmp_path / "datasets"
    folder.mkdir()
    monkeypatch.setattr(benchmarks, "FOLDER", folder)

    def declare(name: str, yaml: str, tsv: str) -> Path:
        (folder / f"{name}.yaml").write_text(yaml)
        (folder / f"{name}.tsv").write_text(tsv)
        return folder / f"{name}.tsv"

    return declare
