"""The embedded model in memory, for servers, and a place for results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ivcp_eval.cli import main
from ivcp_eval.interface import models
from ivcp_eval.reports.table import Row, read_results, read_samples
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement


@pytest.fixture(scope="session")
def session() -> Session:
    weights = models.locate("tiny")
    return Session(weights, Placement().resolve(), Limits.published(weights))


@dataclass(frozen=True)
class Bench:
    """Runs sweeps in one folder."""

    folder: Path

    def sweep(self, name: str, served: str, methods: Sequence[dict[str, Any]], **more: Any) -> int:
        """Run a sweep of the embedded model; ``served``: the URL of its unpruned server, or nothing."""
        model = {"served": self.server(served)} if served else None
        raw = {
            "models": {"tiny": model},
            "benchmarks": ["tiny_mcq", "tiny_grounding"],
            "methods": list(methods),
            **{"controls": [], "limit": 5, "shard": 3, "timing": 0},
            **more,
        }
        spec = self.folder / f"{name}.yaml"
        spec.write_text(yaml.safe_dump(raw))
        return main(["sweep", "run", str(spec), "--runs", str(self.folder / "runs"), "--quiet"])

    @staticmethod
    def server(url: str, **more: Any) -> dict[str, Any]:
        """As a sweep file has it."""
        return {"base_url": url, "model": "tiny", "concurrency": 2, **more}

    def pruned(self, url: str, **more: Any) -> dict[str, Any]:
        """The entry of a server that prunes."""
        return {"method": "deployed", "ratios": [0.5], "served": self.server(url, **more)}

    def rows(self, name: str) -> dict[tuple[str, str], Row]:
        """(method, benchmark) -> row of the headline metric."""
        found: dict[tuple[str, str], Row] = {}
        for row in read_results(self.folder / f"{name}.csv"):
            found.setdefault((row["method"], row["benchmark"]), row)
        return found

    def samples(self, row: Row) -> list[dict[str, Any]]:
        """The per-sample rows behind a row."""
        return [dict(sample) for sample in read_samples(self.folder / row["predictions"])]

    def results(self, name: str) -> dict[str, bytes]:
        """The CSV of a sweep, and the per-sample files of every cell, by name."""
        files = [self.folder / f"{name}.csv", *self.folder.glob("runs/*/*/*/predictions.csv")]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("LMUData", str(tmp_path / "LMUData"))
    (tmp_path / "LMUData").mkdir()
    return Bench(tmp_path)
