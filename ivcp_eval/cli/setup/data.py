"""Show which benchmark files are here, and fetch or explain the others."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ivcp_eval import benchmarks
from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.benchmarks.refcoco.partial import not_whole
from ivcp_eval.cli import notices, say
from ivcp_eval.files import file_digest
from ivcp_eval.reports.terminal import fold, wrapped

State = Literal["here", "not whole", "wrong checksum", "missing"]
Say = Callable[[str], None]

STOCK_GROUNDING = "RefCOCO"  # VLMEvalKit's one file with all eight referring-expression sets
_ANNOTATIONS = "https://zenodo.org/record/5519755/files/mdetr_annotations.tar.gz"
_IMAGES = "http://images.cocodataset.org/zips/train2014.zip"


@dataclass(frozen=True)
class FileState:
    """One benchmark's file.

    Attributes:
        benchmark: which. path: where it is or belongs.
        state: "not whole" is a converted test set that lacks entries, by the report beside it.
        size: bytes, None if missing. checksum: ``algorithm:digest``, empty if it was not asked for.
        how: what to do about it; empty if nothing.
    """

    benchmark: Benchmark
    path: Path
    state: State
    size: int | None = None
    checksum: str = ""
    how: str = ""


def state_of(benchmark: Benchmark, root: Path, verify: bool = True) -> FileState:
    """Look at one file below VLMEvalKit's data root.

    Args:
        verify: compute checksums; without, a file that is there counts as right.
    """
    path = benchmark.path or root / f"{benchmark.vlmeval}.tsv"
    if not path.is_file():
        return FileState(benchmark, path, "missing", how=how_to_get(benchmark))
    size = path.stat().st_size
    expected = f"sha256:{benchmark.sha256}" if benchmark.sha256 else f"md5:{benchmark.md5}" if benchmark.md5 else ""
    checksum = ""
    if verify:
        algorithm = expected.partition(":")[0] or "sha256"
        checksum = f"{algorithm}:{file_digest(path, algorithm)}"
        if expected and checksum != expected:
            how = f"{expected} is expected: remove it, then {how_to_get(benchmark)}"
            return FileState(benchmark, path, "wrong checksum", size, checksum, how)
    problem = not_whole(path)
    return FileState(benchmark, path, "not whole" if problem else "here", size, checksum, problem)


def how_to_get(benchmark: Benchmark) -> str:
    """In words."""
    if benchmark.group == benchmarks.OWN:
        return f"add it again: `ivcp data add {benchmark.source} --name {benchmark.name}`"
    if benchmark.file:
        return "restore it: git checkout datasets/"
    if benchmark.url:
        return f"`ivcp data prepare {benchmark.name}` fetches {benchmark.url}"
    if benchmark.kind == "grounding":
        return (
            f"`ivcp data prepare {benchmark.name}` fetches and splits VLMEvalKit's {STOCK_GROUNDING}.tsv; from the "
            f"sources: unpack {_ANNOTATIONS} and {_IMAGES}, then convert_to_tsv.py --annotations_files ... "
            "--images_folder train2014 --output_dir $LMUData"
        )
    return f"by hand: {benchmark.source}"


def prepare(names: Sequence[str], root: Path, say: Say = lambda text: None) -> list[FileState]:
    """Fetch what is missing, where VLMEvalKit has an address for it; returns all files' states afterwards.

    A file that is there is left alone, also a wrong one. A download gets its name only when it is whole and right.

    Raises:
        ValueError: an unknown name. ImportError: VLMEvalKit, which fetches, is not installed.
    """
    states = []
    for benchmark in chosen(names):
        state = state_of(benchmark, root)
        if state.state == "missing":
            say(f"{benchmark.name}: fetching")
            problem = _get(benchmark, root, say)
            state = state_of(benchmark, root)
            if problem:
                state = FileState(benchmark, state.path, state.state, state.size, state.checksum, problem)
        states.append(state)
    return states


def chosen(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name or group, each once; all of them without a name. Raises ValueError for an unknown name."""
    return [benchmarks.load(name) for name in benchmarks.expand(names or benchmarks.groups())]


def _get(benchmark: Benchmark, root: Path, say: Say) -> str:
    """Why it could not be had; empty if it was."""
    from ivcp_eval.vlmeval_bridge.environment import fetch

    if benchmark.url:
        return fetch(benchmark.url, benchmark.md5, root / f"{benchmark.vlmeval}.tsv")
    if benchmark.kind == "grounding":
        return _split_stock(root, say)
    return how_to_get(benchmark)


def _split_stock(root: Path, say: Say) -> str:
    """All eight grounding sets from VLMEvalKit's one file."""
    from ivcp_eval.benchmarks.refcoco.records import ConversionError
    from ivcp_eval.benchmarks.refcoco.stock import convert_stock
    from ivcp_eval.benchmarks.refcoco.writer import Options
    from ivcp_eval.vlmeval_bridge.environment import fetch, stock_address

    stock = root / f"{STOCK_GROUNDING}.tsv"
    if not stock.is_file():
        problem = fetch(*stock_address(STOCK_GROUNDING), stock)
        if problem:
            return problem
    say(f"splitting {stock}")
    try:
        convert_stock(stock, root, Options())
    except ConversionError as error:
        return str(error)
    return ""


# -- command --------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``ivcp data``."""
    add = parser.add_argument
    add("words", nargs="*", metavar="[prepare NAME | add FILE]", help="names or groups to show; after the word "
        "prepare: to fetch; after the word add: files of your own pictures to make benchmarks of")  # fmt: skip
    add("--name", default="", help="add: of the benchmark (default: the file's name without its ending)")
    add(
        "--kind",
        default="",
        help="add: mcq, yes_no, grounding or short_answer (default: as before, else what the answers are)",
    )
    add("--prompt", default="", help="add: family, which puts questions into the model's wording of their kind, or "
        "dataset, which sends them as they stand (default: as before, else family)")  # fmt: skip
    add("--root", type=Path, help="VLMEvalKit's data root (default: $LMUData, else ~/LMUData)")
    add("--quick", action="store_true", help="do not compute checksums")


def run(args: argparse.Namespace) -> int:
    """Show or fetch; 1 if something that was to be fetched is not here now."""
    from ivcp_eval.vlmeval_bridge.environment import data_root

    if args.words[:1] == ["add"]:
        return _add(args)
    if args.name or args.kind or args.prompt:
        raise ValueError("--name, --kind and --prompt go with `ivcp data add FILE`")
    root = args.root or data_root()
    if args.words[:1] != ["prepare"]:
        say(table([state_of(benchmark, root, not args.quick) for benchmark in chosen(args.words)]))
        return 0
    if not args.words[1:]:
        raise ValueError("name what to prepare: benchmarks or groups, e.g. `ivcp data prepare POPE MME`")
    states = prepare(args.words[1:], root, notices(args))
    say(table(states))
    return int(any(state.state != "here" for state in states))


def _add(args: argparse.Namespace) -> int:
    from ivcp_eval.vlmeval_bridge.reading import own

    files = args.words[1:]
    if args.root:
        raise ValueError("benchmarks of your own lie below VLMEvalKit's data root: set LMUData in place of --root")
    if not files or (args.name and len(files) > 1):
        raise ValueError("`ivcp data add FILE...` needs a .jsonl or .tsv file, and with --name one alone")
    names = [own.add(Path(file), args.name, args.kind, args.prompt, notices(args)) for file in files]
    say(table([state_of(benchmarks.load(name), benchmarks.own_folder(), not args.quick) for name in names]))
    return 0


def table(states: Sequence[FileState]) -> str:
    """For people: one line per file, then what to do; advice that differs in the name alone stands once."""
    columns: dict[str, list[str]] = {
        "benchmark": [state.benchmark.name for state in states],
        "group": [state.benchmark.group for state in states],
        "state": [state.state for state in states],
        "MB": [_megabytes(state.size) for state in states],
        "checksum": [state.checksum[:14] for state in states],
        "file": [str(state.path) for state in states],
    }
    lines = [fold(columns, names=["benchmark"], prose="file")]
    advice: dict[str, list[FileState]] = {}
    for state in states:
        if state.how:
            advice.setdefault(state.how.replace(state.benchmark.name, "NAME"), []).append(state)
    for general, members in advice.items():
        lines += ["", wrapped(", ".join(state.benchmark.name for state in members) + ":")]
        lines.append(wrapped(members[0].how if len(members) == 1 else general, indent="  "))
    return "\n".join(lines)


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f}"
