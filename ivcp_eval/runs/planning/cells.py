"""A cell is one variant on one benchmark: its content hash, its folder, and whether it is done. No torch.

The hash covers everything that can change a prediction or a verdict, the source of the code that makes them included.
Two runs with the same hash are the same measurement, so finished cells are reused and killed ones are continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ivcp_eval import files
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.variants import Variant

ROOT = files.PACKAGE.parent
RUNS = files.RESULTS / "runs"

# Source files whose change can change a prediction, a score or a measured cost; no reports, no commands.
_CODE = (
    "model_adapters/**/*.py",
    "ivcp_eval/engine/**/*.py",
    "ivcp_eval/methods/**/*.py",
    "ivcp_eval/interface/*.py",
    "ivcp_eval/benchmarks/*.py",
    "ivcp_eval/vlmeval_bridge/**/*.py",
    "ivcp_eval/runs/answering/*.py",
)
_DISTRIBUTIONS = {"torch": "torch", "transformers": "transformers", "vlmeval": "ms-vlmeval"}


@cache
def code_hash() -> str:
    """Hash of the source that makes predictions and scores; 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _CODE for path in ROOT.glob(pattern) if path.is_file()}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def versions() -> dict[str, str]:
    """Installed versions of what takes part in a prediction; "missing" if it is not installed."""
    return {name: _version(distribution) for name, distribution in _DISTRIBUTIONS.items()}


def _version(distribution: str) -> str:
    for candidate in (distribution, distribution.removeprefix("ms-")):
        try:
            return f"{candidate} {version(candidate)}" if "vlmeval" in candidate else version(candidate)
        except PackageNotFoundError:
            continue
    return "missing"


@dataclass(frozen=True)
class Identity:
    """Everything that can change a cell's result.

    Attributes:
        variant: model, method, ratio, parameters, seed.
        method_parameters: all of the method's fields, defaults included.
        weights: revision or fingerprint of the checkpoint.
        benchmark, data: name and SHA-256 of its file. limit: first rows only, or None.
        scoring: SHA-256 of where its data file says that scores stand.
        prompt: SHA-256 of the prompt templates.
        judge: who rates. limits: pixels and answer length. placement: device kind, dtype, attention.
        versions, code: of the libraries and of our own source.
        method_source: package, version and code of a plug-in's method; empty for a method of this package.
    """

    variant: Variant
    method_parameters: Mapping[str, Any]
    weights: str
    benchmark: str
    data: str
    scoring: str
    limit: int | None
    prompt: str
    judge: str
    limits: Mapping[str, Any]
    placement: Mapping[str, str]
    versions: Mapping[str, str]
    code: str
    method_source: str = ""

    @property
    def canonical(self) -> str:
        """Canonical JSON; fields that came later are left out at their default, so that earlier hashes stay."""
        fields = {**asdict(self), "variant": self.variant.to_json()}
        if not self.method_source:
            del fields["method_source"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), default=str)

    @property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """One variant on one benchmark, and its files.

    Attributes:
        exact: answers that were made together with others in half precision, where company changes how a row is
            rounded, do not count; the cell is then answered again, and serves everybody.
    """

    identity: Identity
    runs: Path = RUNS
    exact: bool = False

    @property
    def folder(self) -> Path:
        """``<runs>/<model>/<benchmark>/<variant>-<hash>``."""
        variant = self.identity.variant
        label = "none" if variant.method == "none" else f"{variant.method}-{variant.share}"
        return self.runs / variant.model / self.identity.benchmark / f"{label}-{self.identity.hash}"

    @property
    def journal(self) -> Path:
        """Append-only answers."""
        return self.folder / "journal.jsonl"

    @property
    def predictions(self) -> Path:
        """Per-sample CSV."""
        return self.folder / "predictions.csv"

    @property
    def record(self) -> Path:
        """``run.json``, renamed into place last: its presence means the cell is whole."""
        return self.folder / "run.json"

    def finished(self) -> dict[str, Any] | None:
        """The record of a whole cell, or None."""
        record = self.noted()
        return record if record and record["status"] == "ok" else None

    def noted(self) -> dict[str, Any] | None:
        """The record of a cell that was scored or failed, or None."""
        if not self.record.is_file():
            return None
        record: dict[str, Any] = json.loads(self.record.read_text(encoding="utf-8"))
        return None if self.exact and record.get("together") else record

    def lacks(self, answer: Answer | None) -> bool:
        """Whether an answer is missing, failed, or does not count (``exact``)."""
        return answer is None or bool(answer.error) or (self.exact and answer.together)
