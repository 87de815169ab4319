"""A cell is one variant on one benchmark: its content hash, its folder, and whether it is done. No torch.

The hash covers everything that can change an answer or a verdict, the source of the code that makes them included.
Two runs with the same hash are the same measurement, so finished cells are reused and killed ones are continued.

Files of a cell, in the order in which they come: ``cell.json`` (what it is), ``journal.jsonl`` (its answers),
``scores.json`` (what the evaluator said); from these alone ``predictions.csv`` and ``run.json`` are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ivcp_eval import files
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.variants import BASELINE, Variant
from ivcp_eval.reports.schema import STATUSES

RUNS = files.RESULTS / "runs"

# What takes part in an answer or a verdict, pictures and tokens included.
_DISTRIBUTIONS = {
    "torch": "torch",
    "transformers": "transformers",
    "vlmeval": "ms-vlmeval",
    "tokenizers": "tokenizers",
    "pillow": "pillow",
    "torchvision": "torchvision",
    "numpy": "numpy",
}


@cache
def versions(*more: str) -> dict[str, str]:
    """Installed versions of what takes part in a prediction, ``more`` included; "missing" if it is not installed."""
    return {name: _version(package) for name, package in {**_DISTRIBUTIONS, **{m: m for m in more}}.items()}


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
        versions: of the libraries. code: hash of our own source behind the cell (`closure.code_of`).
        method_source: package, version and code of a plug-in's method; empty for a method of this package.
        generation: the parameters of generation that are stated, all others being neutral (`AbstractAdapter.stated`);
            empty in cells of an earlier version, which took what the checkpoint's generation_config.json said.
        video: how files of videos become frames (``nframe=8``, ``fps=1.0``, ``rows``: as each row says), and who
            decodes them; empty where frames are pictures of the data, whose hash covers them and their times.
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
    generation: Mapping[str, Any] = field(default_factory=dict)
    video: str = ""

    @cached_property
    def canonical(self) -> str:
        """Canonical JSON; fields that came later are left out at their default, so that earlier hashes stay."""
        fields = {**asdict(self), "variant": self.variant.to_json()}
        for late in ("method_source", "generation", "video"):
            if not fields[late]:
                del fields[late]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), default=str)

    @cached_property
    def hash(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()[:16]


NOTES_ADVICE = "the next run writes it again; the answers are kept"


def read_notes(path: Path) -> dict[str, Any]:
    """The content of ``cell.json``: the cell's identity as JSON, and the sizes of the decoder or None.

    Beside them, unless an earlier version wrote it, the configuration that the sizes were read from.

    Raises:
        FileNotFoundError: there is none. DamagedError: it holds something else.
    """
    content = files.read_json(path, NOTES_ADVICE)
    with files.damage_as_clear_error(path, NOTES_ADVICE):
        sizes = (content["decoder"] or {}).values()
        numbers = [n for size in sizes for n in (size if isinstance(size, list) else [size]) if n is not None]
        objects = content["identity"], content.get("text_config", {})
        if not all(isinstance(part, dict) for part in objects) or not all(type(n) is int for n in numbers):
            raise TypeError("no identity, no configuration, or sizes that are no numbers")
    return content


def code_listing(runs: Path, code: str) -> Path:
    """Where the files behind a code hash are listed, for all cells of it."""
    return runs / "code" / f"{code}.json"


@dataclass(frozen=True)
class Cell:
    """One variant on one benchmark, and its files.

    Attributes:
        code: source file -> digest, of what the identity has the hash of.
        exact: answers that were made together with others in half precision, where the other rows change how a row is
            rounded, do not count; the cell is then answered again, and serves everybody.
    """

    identity: Identity
    runs: Path = RUNS
    exact: bool = False
    code: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """``<runs>/<model>/<benchmark>/<variant>-<hash>``."""
        variant = self.identity.variant
        return self.runs / variant.model / self.identity.benchmark / f"{self.label}-{self.identity.hash}"

    @property
    def label(self) -> str:
        """What its folder's name begins with; variants that differ in a parameter or the seed alone share it."""
        variant = self.identity.variant
        return variant.method if variant.method == BASELINE else f"{variant.method}-{variant.share}"

    @property
    def notes(self) -> Path:
        """What the cell is: `note`."""
        return self.folder / "cell.json"

    @property
    def journal(self) -> Path:
        """Append-only answers."""
        return self.folder / "journal.jsonl"

    @property
    def scores(self) -> Path:
        """What the evaluator said of the answers (`runs.records.scores`)."""
        return self.folder / "scores.json"

    @property
    def predictions(self) -> Path:
        """Per-sample CSV."""
        return self.folder / "predictions.csv"

    @property
    def record(self) -> Path:
        """``run.json``, renamed into place last: its presence means the cell is whole."""
        return self.folder / "run.json"

    def note(self, decoder: Mapping[str, Any] | None = None, text_config: Mapping[str, Any] | None = None) -> None:
        """Note, before the first answer, what the cell is, and once for each code hash the files that it covers.

        Args:
            decoder: sizes of the model's decoder (`engine.cost.flops.DecoderShape`), by which FLOPs are counted.
            text_config: the configuration that they are read from. None, of both: what was noted stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        before = None
        with suppress(FileNotFoundError, files.DamagedError):  # which is mended here
            before = read_notes(self.notes)
        content = {"decoder": None, **(before or {}), "identity": json.loads(self.identity.canonical)}
        for name, value in (("decoder", decoder), ("text_config", text_config)):
            if value is not None:
                content[name] = json.loads(json.dumps(value, default=str))
        if content != before:
            files.write_json(self.notes, content, sealed=True)
        listing = code_listing(self.runs, self.identity.code)
        if self.code and not listing.is_file():
            listing.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(listing, dict(self.code))

    def finished(self) -> dict[str, Any] | None:
        """The record of a whole cell, or None."""
        record = self.load_record()
        return record if record and record["status"] == "ok" else None

    def load_record(self) -> dict[str, Any] | None:
        """The record of a cell that was scored or failed, or None."""
        try:
            record = self.read_record()
        except files.DamagedError:  # `reopen` says so
            return None
        return None if record is None or (self.exact and record.get("together")) else record

    def read_record(self) -> dict[str, Any] | None:
        """The content of ``run.json``, or None.

        Raises:
            DamagedError: it is no record.
        """
        advice = "it is made again from the answers and scores beside it"
        try:
            record = files.read_json(self.record, advice)
        except FileNotFoundError:
            return None
        with files.damage_as_clear_error(self.record, advice):
            if record["status"] not in STATUSES or not isinstance(record["reason"], str):
                raise ValueError(f"status {str(record['status'])[:40]!r}")
        return record

    def needs_answer(self, answer: Answer | None) -> bool:
        """Whether an answer is missing, failed and may be tried again, or does not count (``exact``)."""
        return answer is None or not answer.is_settled or (self.exact and answer.together)
