"""What the evaluation of a cell left, and who made it: the content of ``scores.json``, beside the journal.

Together with the journal it is all that a record is made of, so records and tables can be made again without
VLMEvalKit, data, weights or a GPU.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import math
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import ivcp_eval
from ivcp_eval import files


@dataclass(frozen=True)
class Sample:
    """One row of the benchmark.

    Attributes:
        index: the benchmark's own. key: of its answer in the journal; `unread` where there is no prompt.
        cluster, category, answer: as in the per-sample CSV.
        score: in 0..1, None if it is not scored alone. iou, similarity: as in the per-sample CSV.
    """

    index: str
    key: str
    cluster: str = ""
    category: str = ""
    answer: str = ""
    score: float | None = None
    iou: float | None = None
    similarity: float | None = None


def unread(index: str) -> str:
    """Key in the journal of the failure of a row whose prompt cannot be built."""
    return f"row {index}"


@dataclass(frozen=True)
class Made:
    """By which code and when a cell was scored; making its record again leaves this as it is.

    Attributes:
        commit, dirty: of ivcp-eval. faithfulness: of the method, which may be a plug-in that is not installed later.
        date: ISO 8601; empty without ``timing``, so that equal runs are equal bytes.
        timing: whether the date is noted. timeout_s: time limit of an answer.
    """

    commit: str = ""
    dirty: bool | None = None
    faithfulness: str = ""
    date: str = ""
    timing: bool = True
    timeout_s: float | None = None

    @classmethod
    def now(cls, faithfulness: str, timing: bool, timeout_s: float | None = None) -> Made:
        """By the code at hand."""
        commit, dirty = _git()
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds") if timing else ""
        return cls(commit, dirty, faithfulness, date, timing, timeout_s)


def _git() -> tuple[str, bool | None]:
    """Commit of the code, and whether tracked files differ from it; an installed package has its version instead."""
    if files.CHECKOUT is None:  # what it is installed in may be a checkout of something else
        return f"version {ivcp_eval.__version__}, code {_code_digest()}", None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=files.CHECKOUT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    dirty = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return commit or "", None if dirty is None else bool(dirty)


@cache
def _code_digest() -> str:
    """12 hexadecimal digits of all source files, which every variant of a run shares, unlike a cell's code hash."""
    digest = hashlib.sha256()
    for path in files.source_files():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Scores:
    """What the evaluation of a cell left.

    Attributes:
        made: by which code and when.
        metrics: name -> (score, scale). samples: the benchmark's rows, in its order.
        judge_failures: answers that the judge could not rate, which are left out of the score; None if none was asked.
        remark: what else should be known. problem: why the scores are not those of the whole benchmark, failed answers
            apart, or why there are none. unsupported: the model cannot run the method at all.
        thinking: answers of which only what follows ``</think>`` was scored.
    """

    made: Made
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    judge_failures: int | None = None
    remark: str = ""
    problem: str = ""
    unsupported: bool = False
    thinking: int = 0

    def write(self, path: Path) -> None:
        """Atomically."""
        files.write_json(path, _without_nan(asdict(self)), sealed=True)

    @classmethod
    def read(cls, path: Path) -> Scores:
        """What `write` wrote.

        Raises:
            FileNotFoundError: there is none. DamagedError: it holds something else.
        """
        advice = "the next run scores again; the answers are kept"
        content = files.read_json(path, advice)
        with files.damage_as_clear_error(path, advice):
            content["made"] = Made(**content["made"])
            content["metrics"] = {name: (score, scale) for name, (score, scale) in content["metrics"].items()}
            content["samples"] = tuple(Sample(**sample) for sample in content["samples"])
            scores = cls(**content)
            for part in (scores, scores.made, *scores.samples):
                _check(part)
            for value in itertools.chain(*scores.metrics.values()):
                _check_type("a metric", value, "float | None")
        return scores


def _check(part: Any) -> None:
    """Raise TypeError for a field of another type than it is declared with."""
    for declared in fields(part):
        if declared.name not in ("made", "metrics", "samples"):
            _check_type(declared.name, getattr(part, declared.name), str(declared.type))


def _check_type(name: str, value: Any, declared: str) -> None:
    types = {"str": str, "bool": bool, "int": int, "float": int | float, "None": type(None)}
    if not any(
        isinstance(value, types[word]) and (isinstance(value, bool) == (word == "bool"))
        for word in declared.split(" | ")
    ):
        raise TypeError(f"{name} is {str(value)[:80]!r}, which is no {declared}")


def _without_nan(value: Any) -> Any:
    """A score that an evaluator left as NaN is none."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
