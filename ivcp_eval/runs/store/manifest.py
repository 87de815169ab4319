"""Which cells make up a run, noted when it starts: what its results are built from, without weights or data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ivcp_eval.files import DamagedError, damage_as_clear_error, read_json, write_json

#: What is noted of each model.
MODEL = {"checkpoint": str, "hub": bool, "family": str, "revision": str, "trained": bool, "device": str}


def path(state: Path) -> Path:
    """The file in a run's state folder."""
    return state / "manifest.json"


def spec_path(state: Path) -> Path:
    """The spec as it was when the run started, options of the command line included; workers read this one."""
    return state / "spec.json"


def write_spec(state: Path, raw: Mapping[str, Any]) -> None:
    """Write it."""
    state.mkdir(parents=True, exist_ok=True)
    write_json(spec_path(state), dict(raw))


def read(state: Path) -> dict[str, Any]:
    """Its content: name, problems, models, cells.

    Raises:
        FileNotFoundError: the run was never started. DamagedError: the file holds something else.
    """
    file = path(state)
    if not file.exists():
        raise FileNotFoundError(f"{file} is not there: {state.name!r} has not run; start it with `ivcp sweep run`")
    advice = "the next run writes it again"
    content = read_json(file, advice)
    with damage_as_clear_error(file, advice):
        for model in content["models"].values():
            if not all(isinstance(model[name], kind) for name, kind in MODEL.items()):
                raise TypeError(f"a model is {str(model)[:80]}")
        for cell in content["cells"]:
            folder = PurePosixPath(cell["folder"])
            if cell["model"] not in content["models"] or folder.is_absolute() or ".." in folder.parts:
                raise ValueError(f"a cell is {str(cell)[:80]}")
        if not isinstance(content["name"], str) or not isinstance(content["problems"], list):
            raise TypeError("no name, or no problems")
    return content


def device(state: Path, model: str) -> str:
    """Kind of device that the run was started for; empty if it was not."""
    try:
        return str(read(state)["models"].get(model, {}).get("device", ""))
    except (FileNotFoundError, DamagedError):
        return ""


def write(
    state: Path,
    name: str,
    problems: Sequence[str],
    models: Mapping[str, Any],
    cells: Sequence[tuple[str, str]],
    runs: str = "",
) -> Path:
    """Write it unless it stands so already; returns the file.

    Args:
        cells: (model, folder below the runs). runs: name of that folder, beside which the state lies.
    """
    content = {
        "name": name,
        "problems": list(problems),
        "models": dict(models),
        "cells": [{"model": model, "folder": folder} for model, folder in cells],
        "runs": runs,
    }
    file = path(state)
    try:
        same = read(state) == content
    except (FileNotFoundError, DamagedError):
        same = False
    if not same:
        state.mkdir(parents=True, exist_ok=True)
        write_json(file, content, sealed=True)
    return file
