"""The laboratory of the neighbouring tests, and analyses in it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ivcp_eval.cli import main
from tests.runs.conftest import Lab

Analyse = Callable[..., list[dict[str, str]]]


@pytest.fixture
def analyse(lab: Lab) -> Analyse:
    """Run a verb on the random tiny model; its table as CSV rows, from ``table.csv`` in the lab's folder."""

    def run(*words: str, code: int = 0) -> list[dict[str, str]]:
        out = lab.folder / "table.csv"
        given = ("--model-path", str(lab.model), "--work", str(lab.folder / "work"), "--output", str(out), "--quiet")
        assert main([*words, *given, "--max-new-tokens", "6"]) == code
        return read(out) if code == 0 else []

    return run


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After the call no model can be loaded."""

    def forbid() -> None:
        def load(*_: Any, **__: Any) -> None:
            raise AssertionError("a model was loaded although every answer is kept")

        monkeypatch.setattr("ivcp_eval.runs.answering.session.Session.__init__", load)

    return forbid
