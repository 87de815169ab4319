"""What a training run tells and leaves on disk: whole tensor files, and curves that a resumed run continues."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def say(text: str) -> None:
    """Print a line of progress at once, with the time."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the old one stays whole until the new one is on disk."""
    temporary = path.with_suffix(".tmp")
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=dict(metadata))
    with temporary.open("rb") as handle:
        os.fsync(handle.fileno())
    temporary.replace(path)


class Curve:
    """A CSV that a resumed run continues as if it had never stopped: later rows than the state's are dropped."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as handle:
                self.rows = [row for row in csv.DictReader(handle) if int(row["steps"]) <= steps]

    def add(self, row: dict[str, Any]) -> None:
        """Append ``row`` (it must hold ``steps``); columns are those that any row has."""
        self.rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        columns = list(dict.fromkeys(name for r in self.rows for name in r))
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, fieldnames=columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        temporary.replace(self.path)
