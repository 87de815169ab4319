"""Evaluations and sweeps on the tiny model with random weights, in this process or in children that can be killed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.cli import main
from ivcp_eval.reports.table import Row, read_results

SPEC = """
models: {{tiny: {model}}}
benchmarks: [tiny_mcq, tiny_yes_no]
methods:
  - {{method: ivc_prune, ratios: [0.75, 0.5]}}
  - {{method: fastv, ratios: [0.5]}}
  - {{method: downsample, ratios: [0.5]}}
controls: []
limit: {limit}
shard: 3
max_new_tokens: 5
batch: 1
timing: false
"""


@dataclass(frozen=True)
class Bench:
    """One sweep file and one place for its records."""

    spec: Path
    folder: Path
    lmu: Path

    @property
    def csv(self) -> Path:
        return self.folder / f"{self.spec.stem}.csv"

    def arguments(self, verb: str, *more: str) -> list[str]:
        return ["sweep", verb, str(self.spec), "--runs", str(self.folder / "runs"), *more]

    def call(self, verb: str, *more: str) -> int:
        return main(self.arguments(verb, *more))

    def call_results(self) -> int:
        """`ivcp sweep results`, from the records alone."""
        return main(["sweep", "results", str(self.spec), "--runs", str(self.folder / "runs")])

    def elsewhere(self, folder: Path) -> Bench:
        return Bench(self.spec, folder, self.lmu)

    def results(self) -> dict[str, bytes]:
        """The CSV, the tables, and the per-sample files of every cell, by name.

        What SIGKILL leaves of a file that was being written has a hidden name of its own and counts for nobody.
        """
        found = {path.name: path.read_bytes() for path in [self.csv, *self.csv.with_suffix("").glob("[!.]*")]}
        samples = self.folder.glob("runs/*/*/*/predictions.csv")
        return found | {str(path.relative_to(self.folder)): path.read_bytes() for path in samples}

    def start(self, verb: str, *more: str) -> Any:
        """A child process at work, forked from a server that has imported everything."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.runs.preload"])
        process = context.Process(target=_child, args=(self.arguments(verb, *more), str(self.lmu), str(Path.cwd())))
        process.start()
        return process


def _child(arguments: list[str], lmu: str, folder: str) -> None:
    os.environ["LMUData"] = lmu  # noqa: SIM112 (VLMEvalKit's name)
    os.chdir(folder)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os._exit(main(arguments))


@pytest.fixture
def bench(random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("LMUData", str(tmp_path / "LMUData"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "LMUData").mkdir()
    spec = tmp_path / "small.yaml"
    spec.write_text(SPEC.format(model=random_model, limit=5))
    return Bench(spec, tmp_path / "undisturbed", tmp_path / "LMUData")


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
