"""Which cells make up a run, noted when it starts: what its results are built from, without weights or data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ivcp_eval.files import write_json


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
        FileNotFoundError: the run was never started. ValueError: the file is damaged.
    """
    file = path(state)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: {state.name!r} has not run; start it with `ivcp sweep run`")
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _ = found["name"], found["models"], found["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); the next run writes it again") from None
    return found


def device(state: Path, model: str) -> str:
    """Kind of device that the run was started for; empty if it was not."""
    try:
        return str(read(state)["models"].get(model, {}).get("device", ""))
    except (FileNotFoundError, ValueError):
        return ""


def write(
    state: Path, name: str, problems: Sequence[str], models: Mapping[str, Any], cells: Sequence[tuple[str, str]]
) -> Path:
    """Write it unless it stands so already; returns the file. ``cells`` are (model, folder below the runs)."""
    found = {
        "name": name,
        "problems": list(problems),
        "models": dict(models),
        "cells": [{"model": model, "folder": folder} for model, folder in cells],
    }
    file = path(state)
    try:
        same = read(state) == found
    except (FileNotFoundError, ValueError):
        same = False
    if not same:
        state.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    return file
