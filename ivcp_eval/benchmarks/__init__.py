"""Benchmarks as data: one small file each under ``datasets/``; the file name is the only name.

Benchmarks of a user's own (`vlmeval_bridge.reading.own` writes them) lie in `own_folder`, data file and TSV.

A file says what VLMEvalKit calls the data set, where the score stands in what VLMEvalKit writes, how samples cluster,
and whether a judge is needed. `load` reads one; any other VLMEvalKit name works too, through `undeclared`.
"""

from __future__ import annotations

import csv
import hashlib
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from ivcp_eval import files
from ivcp_eval.benchmarks import clips
from ivcp_eval.interface import QuestionKind
from ivcp_eval.interface.marked import Marked, Place
from ivcp_eval.interface.registry import unknown

FOLDER = files.DATASETS
OWN = "own"
_BY_ROW = ("rows", "frames")  # values of `Benchmark.sampling` that leave it to the table
#: Of files of a user's own pictures.
OWN_SUFFIXES = (".jsonl", ".tsv")

#: Types of a data file's fields, by how they are declared here.
_KINDS: Mapping[str, Any] = {"str": str, "float": int | float, "bool": bool, "int | None": int | None, "Mapping": dict}


class DataMissing(RuntimeError):
    """A benchmark's data is not on this machine and cannot be fetched; the message says how to get it."""


@dataclass(frozen=True)
class Metric:
    """Where VLMEvalKit's evaluator leaves one number.

    Attributes:
        name: as in the CSV.
        file: how the file name ends, e.g. ``_acc.csv``; ``{judge}`` stands for the judge's name. Empty where the
            reference is the baseline (`agreement` computes it).
        column: its column. rows: the columns and values that pick the row; all rows if empty.
        combine: "only" if one row must match, "sum" over columns listed with ``+`` (MME's total), "mean" over rows.
        factor: what the number is multiplied by to stand on ``scale``.
        scale: the best possible score.
        optional: it is the score of one category, the column, which a run cut by ``--limit`` may lack.
    """

    name: str
    file: str
    column: str
    rows: Mapping[str, Any] = field(default_factory=dict)
    combine: str = "only"
    factor: float = 1.0
    scale: float = 100.0
    optional: bool = False


@dataclass(frozen=True)
class Samples:
    """Where VLMEvalKit's evaluator leaves the per-sample scores, or the rule that finds them.

    Attributes:
        file, column: file ending and column. factor: to 0..1.
        rows: only rows with these values have a score of their own.
        rule: a function of `vlmeval_bridge.sample_scores`, for evaluators that leave no score per sample.
    """

    file: str = ""
    column: str = ""
    factor: float = 1.0
    rows: Mapping[str, Any] = field(default_factory=dict)
    rule: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: file name without suffix; the name in every CSV.
        title: one line for people.
        kind: kind of question, which decides the family's prompt; None leaves the data set's own prompt.
        prompt: "family" or "dataset": whose wording is sent.
        vlmeval: VLMEvalKit's data set name.
        group: "embedded" (ships here), "matrix" (the twenty), "own" (a user's) or "more".
        file: TSV inside ``datasets/`` for embedded sets, the whole path for own ones, else empty.
        sha256: of that file.
        metrics: the first is the headline.
        samples: per-sample scores; None if the evaluator leaves none.
        cluster: column whose equal values belong together in statistics; ``image`` compares the pictures themselves;
            empty for the index.
        category: column of the per-sample categories.
        judge: "none", "optional" (only unparsable answers) or "required".
        thinking: "split": of a thinking model's answer only what follows ``</think>`` is scored (`split_thinking`), as
            VLMEvalKit advises for all sets; "kept": its evaluator reads the tags.
        reference: "answers": predictions are compared with the data set's; "baseline": with what the unpruned model
            answered, so the score is an agreement, no accuracy.
        sampling: which frames of its videos are shown: "nframe=8", "fps=1" (`clips.Sampling`), "rows", where each row
            says it of a file, or "frames", where videos are pictures with times in the table; empty for pictures.
        n_samples: rows of the full set, None if unknown.
        abilities: tags.
        url, md5: where VLMEvalKit fetches its file, and the checksum it notes; empty for files that it cannot fetch.
        source, licence, note: provenance, and what to know of the prompt and the score.
    """

    name: str
    title: str = ""
    kind: QuestionKind | None = None
    prompt: str = "family"
    vlmeval: str = ""
    group: str = "more"
    file: str = ""
    sha256: str = ""
    metrics: tuple[Metric, ...] = ()
    samples: Samples | None = None
    cluster: str = ""
    category: str = "category"
    judge: str = "none"
    thinking: str = "split"
    reference: str = "answers"
    sampling: str = ""
    n_samples: int | None = None
    abilities: tuple[str, ...] = ()
    url: str = ""
    md5: str = ""
    source: str = ""
    licence: str = ""
    note: str = ""

    @property
    def scoring(self) -> str:
        """SHA-256 of what decides how predictions become numbers."""
        parts: tuple[Any, ...] = (self.metrics, self.samples, self.cluster, self.category, self.kind, self.vlmeval)
        parts += () if self.thinking == "split" else (self.thinking,)  # so that earlier hashes stay
        parts += () if self.reference == "answers" else (self.reference,)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def unscored(self, rows: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """Metrics that need rows which a run cut by ``--limit`` does not have.

        Args:
            rows: column -> cells of the rows that are left.
        """
        missing = []
        for metric in self.metrics:
            incomplete = any(column in rows and str(value) not in rows[column] for column, value in metric.rows.items())
            groups = rows.get(self.category)
            if incomplete or (metric.optional and groups is not None and metric.column not in groups):
                missing.append(metric.name)
        return tuple(missing)

    @property
    def frames(self) -> clips.Sampling | None:
        """Which frames of every video are shown; None where rows say it, or there are no videos."""
        return None if self.sampling in ("", *_BY_ROW) else clips.Sampling.of(self.sampling)

    @property
    def path(self) -> Path | None:
        """The embedded TSV, or None for sets that VLMEvalKit keeps in its data root."""
        return FOLDER / self.file if self.file else None


def content_digest(benchmark: Benchmark, path: Path) -> str:
    """SHA-256 of a benchmark's file, which is at ``path``, and of the video files whose frames are chosen by number or
    rate: else the table has the pictures, or the digests of the frames. Each file is read whole once."""
    digest = files.remembered(path, "sha256", files.file_digest, str)
    found = videos(benchmark, path) if benchmark.frames else {}
    if not found:
        return digest
    both = hashlib.sha256(digest.encode())
    for name, video in sorted(found.items()):
        both.update(f" {name} {files.remembered(video, 'sha256', files.file_digest, str)}".encode())
    return both.hexdigest()


def videos(benchmark: Benchmark, path: Path) -> dict[str, Path]:
    """The video files that are here, of a set of VLMEvalKit's or named in the table of a user's own, by name."""
    if benchmark.path is None:
        folder = files.data_root() / "videos" / benchmark.vlmeval
        found = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock")
        return {file.relative_to(folder).as_posix(): file for file in found}
    with path.open(encoding="utf-8", newline="") as stream, files.long_cells():
        named = {row.get("video") or "" for row in csv.DictReader(stream, delimiter="\t")}
    return {name: Path(name) for name in named if name and Path(name).is_file()}


def video_of(row: Mapping[str, str], found: Mapping[str, Path]) -> Path | None:
    """The file that a row of a set asks about, among its `videos`; None if it is not there.

    VLMEvalKit's classes join ``prefix``, ``video`` and ``suffix``, take ``video_path``, or look for ``video`` as MP4.
    """
    video, prefix, suffix = (row.get(name) or "" for name in ("video", "prefix", "suffix"))
    if video in found:  # as a user's own table has it
        return found[video]
    for name in (f"{prefix}/{video}{suffix}" if prefix else video, row.get("video_path") or ""):
        if (spelt := posixpath.normpath(name.lstrip("/"))) in found:
            return found[spelt]
    own = [file for file in found.values() if video and video in (file.name, file.stem)]
    return own[0] if len(own) == 1 else None


def own_folder() -> Path:
    """Where a user's own benchmarks lie: below VLMEvalKit's data root."""
    return files.data_root() / "own"


def is_file_name(word: str) -> bool:
    """Whether a word is a path to a file of a user's own pictures and no benchmark's name."""
    return Path(word).suffix.lower() in OWN_SUFFIXES


def data_file(name: str) -> Path:
    """The data file of a declared benchmark, or where it would be; a shipped one goes first."""
    shipped, own = FOLDER / f"{name}.yaml", own_folder() / f"{name}.yaml"
    return own if own.is_file() and not shipped.is_file() else shipped


def names(group: str | None = None) -> tuple[str, ...]:
    """Declared benchmarks, sorted; only those of a group if one is named."""
    names = sorted({path.stem for folder in (FOLDER, own_folder()) for path in folder.glob("*.yaml")})
    return tuple(name for name in names if group is None or load(name).group == group)


def groups() -> dict[str, tuple[str, ...]]:
    """Every group with its members, both sorted."""
    return {group: names(group) for group in sorted({load(name).group for name in names()})}


def expand(names_or_groups: Iterable[str]) -> tuple[str, ...]:
    """Names with every group replaced by its members, each once, in the order given.

    A name that is neither declared nor a group passes through: VLMEvalKit may know it.
    """
    known = groups()
    return tuple(dict.fromkeys(member for name in names_or_groups for member in known.get(name, (name,))))


def headline(row: Mapping[str, Any]) -> str:
    """The metric that stands for the benchmark of a results row: the first declared one.

    A benchmark without declared metrics has none; the row's own metric then stands for itself.
    """
    name = row["benchmark"]
    declared = load(name).metrics if data_file(name).is_file() else ()
    return declared[0].name if declared else str(row["metric"])


def load(name: str) -> Benchmark:
    """Read ``datasets/<name>.yaml``, or that of a user's own benchmark.

    Raises:
        ValueError: there is no such file, or it has a wrong key or value; the message names file, line and value.
    """
    path = data_file(name)
    if not path.is_file():
        raise unknown("benchmark", name, names())
    return _read(path, path.stat().st_mtime_ns)


@cache
def _read(path: Path, _changed: int) -> Benchmark:
    name = path.stem
    marked = Marked(path)
    raw = _fields(Benchmark, marked, (), marked.value)
    metrics = [
        _build(Metric, marked, ("metrics", i), entry)
        for i, entry in enumerate(marked.listed(("metrics",), raw.get("metrics", []), dict, "a metric", repeats=True))
    ]
    samples = _build(Samples, marked, ("samples",), raw["samples"]) if raw.get("samples") else None
    if samples and bool(samples.rule) == bool(samples.file and samples.column):
        raise marked.error(("samples",), "samples need either a rule, or a file and a column")
    abilities = marked.listed(("abilities",), raw.get("abilities", []), str, "a tag")
    values = {"vlmeval": name, **raw, "name": name}
    if path.parent == own_folder():
        values |= {"group": OWN, "file": str(path.with_suffix(".tsv"))}
    values |= {"metrics": tuple(metrics), "samples": samples, "abilities": tuple(abilities)}
    benchmark: Benchmark = _build(Benchmark, marked, (), values)
    allowed = {
        "kind": (None, *get_args(QuestionKind)),
        "prompt": ("family", "dataset"),
        "judge": ("none", "optional", "required"),
        "thinking": ("split", "kept"),
        "reference": ("answers", "baseline"),
    }
    for key, words in allowed.items():
        if (got := getattr(benchmark, key)) not in words:
            raise marked.error((key,), f"{key} {got!r}; allowed: {', '.join(word or 'nothing' for word in words)}")
    try:
        _ = benchmark.frames
    except ValueError as error:
        raise marked.error(("sampling",), f"{error}, {' or '.join(_BY_ROW)}") from None
    if len(benchmark.sha256) not in (0, 64):
        raise marked.error(("sha256",), f"sha256 must be 64 hexadecimal digits in quotes, got {benchmark.sha256!r}")
    return benchmark


def undeclared(name: str) -> Benchmark:
    """A VLMEvalKit data set without a file here: its own prompt, every number its evaluator returns.

    Some evaluators read the tags of a thinking model's answer, or remove them, so it is left to them.
    """
    return Benchmark(name=name, title="not declared under datasets/", vlmeval=name, prompt="dataset", thinking="kept")


def notices(benchmark: Benchmark, path: Path, limit: int | None) -> list[str]:
    """What to say of a benchmark before it runs: its file is partial; what a limit leaves without a score.

    Raises:
        DataMissing: nothing could be scored under the limit.
    """
    from ivcp_eval.benchmarks.refcoco.partial import not_whole

    said = [f"{benchmark.name}: {problem}" for problem in [not_whole(path)] if problem]
    if limit is None:
        return said
    rows = _first_rows(path, limit)
    alone = without_pair(benchmark.vlmeval, rows)
    left = {column: [cell for cell, out in zip(cells, alone, strict=True) if not out] for column, cells in rows.items()}
    missing = benchmark.unscored(left)
    if all(alone) or (benchmark.metrics and len(missing) == len(benchmark.metrics)):
        why = "they belong to no pair" if all(alone) else "they belong to no split that is scored"
        raise DataMissing(
            f"benchmark {benchmark.name!r}: its first {limit} rows give no score, {why}; raise --limit or leave it out"
        )
    if any(alone):
        said.append(f"{benchmark.name}: {sum(alone)} rows under --limit {limit} lack their pair and are left out")
    if missing:
        said.append(f"{benchmark.name}: not scored under --limit {limit}, for want of rows: {', '.join(missing)}")
    return said


def without_pair(vlmeval: str, rows: Mapping[str, Sequence[str]]) -> list[bool]:
    """Which rows cannot be scored without another one: MME rates the two questions on an image together.

    Args:
        vlmeval: VLMEvalKit's name, by which it decides so. rows: column -> cells.
    """
    if "MME" not in vlmeval or not {"category", "image_path"} <= set(rows):
        return [False] * len(next(iter(rows.values()), ()))
    pairs = list(zip(rows["category"], rows["image_path"], strict=True))
    sizes = Counter(pairs)
    return [sizes[pair] < 2 for pair in pairs]


def _first_rows(path: Path, limit: int) -> dict[str, list[str]]:
    """Column -> cells of a TSV's first rows, without the pictures; nothing for a file that cannot be read so."""
    try:
        with path.open(encoding="utf-8", newline="") as stream, files.long_cells():
            reader = csv.DictReader(stream, delimiter="\t", strict=True)
            rows = list(islice(reader, limit))
    except (UnicodeDecodeError, csv.Error):  # which reading it as a whole will explain
        return {}
    if any(None in row or None in row.values() for row in rows):  # more cells than columns, or fewer
        return {}
    return {name: [row[name] for row in rows] for name in reader.fieldnames or () if name != "image"}


def _fields(cls: Any, marked: Marked, place: Place, values: Any) -> Mapping[str, Any]:
    return marked.keys(place, values, sorted(f.name for f in fields(cls)))


def _build(cls: Any, marked: Marked, place: Place, values: Any) -> Any:
    """The dataclass of a mapping; raises SpecError for fields that it has not, lacks, or declares of another type."""
    for f in fields(cls):
        if f.name in _fields(cls, marked, place, values):
            kinds = next((kinds for word, kinds in _KINDS.items() if str(f.type).startswith(word)), object)
            value = values[f.name]
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
                raise marked.error((*place, f.name), f"{f.name} must be {f.type}, got {value!r}")
    try:
        return cls(**values)
    except TypeError as error:
        raise marked.error(place, str(error)) from error
