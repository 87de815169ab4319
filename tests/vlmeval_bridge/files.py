"""Small TSV files in a data root of their own, and data sets that a test declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ivcp_eval import benchmarks
from tests.vlmeval_bridge.conftest import Laboratory, RecordingSession
from tests.vlmeval_bridge.miniatures import picture

MCQ = "kind: mcq\nmetrics: [{name: accuracy, file: _acc.csv, column: Overall, factor: 100}]\n"
MCQ += 'samples: {file: "_{judge}_result.tsv", column: hit}\n'
SHORT = "kind: short_answer\nmetrics: [{name: accuracy, file: _acc.csv, column: Overall}]\n"
SHORT += "samples: {file: _results.csv, column: eval_score}\n"
YES_NO = "kind: yes_no\nmetrics: [{name: accuracy, file: _score.csv, column: Overall}]\n"
YES_NO += "samples: {file: _auxmatch.tsv, column: score}\n"
GROUNDING = 'kind: grounding\nmetrics: [{name: "Acc@0.5", file: _acc.csv, column: "Acc@0.5"}]\n'
GROUNDING += "samples: {file: _results.csv, column: hit}\n"


@dataclass
class Files:
    """A folder that is both the data root and the folder of declared data sets."""

    root: Path

    def put(self, name: str, rows: Sequence[Mapping[str, Any]], declared: str = "") -> benchmarks.Benchmark:
        """Write ``<name>.tsv``, each row with a picture unless it brings one; ``declared`` is its data file."""
        full = [{"image": picture(3000 + i), **row} for i, row in enumerate(rows)]
        pd.DataFrame(full).to_csv(self.root / f"{name}.tsv", sep="\t", index=False)
        return self.declare(name, declared)

    def declare(self, name: str, declared: str) -> benchmarks.Benchmark:
        if not declared:
            return benchmarks.load(name) if name in benchmarks.names() else benchmarks.undeclared(name)
        (self.root / f"{name}.yaml").write_text(f"{declared}file: {name}.tsv\n")
        return benchmarks.load(name)

    def score(self, benchmark: benchmarks.Benchmark, given: Mapping[str, str], judge: Any = None) -> Any:
        """What the evaluator says of these answers (index -> answer)."""
        from ivcp_eval.vlmeval_bridge import evaluate as bridge

        dataset = bridge.build(benchmark, None)
        return bridge.score(benchmark, dataset, bridge.stored(dataset, given, self.root), judge)

    def prompts(self, laboratory: Laboratory, benchmark: benchmarks.Benchmark) -> list[str]:
        """The texts that a model is sent, row by row."""
        from ivcp_eval.vlmeval_bridge import evaluate as bridge

        dataset = bridge.build(benchmark, None)
        asked = list(bridge.messages(dataset, laboratory.model(RecordingSession()).prompting))
        assert all(one.message for one in asked), asked
        return [one.message[-1]["value"] for one in asked if one.message]


@pytest.fixture
def files(laboratory: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Declared data sets of the package stay declared: their data files are copied."""
    for path in benchmarks.FOLDER.glob("*.yaml"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    monkeypatch.setenv("LMUData", str(tmp_path))
    return Files(tmp_path)
