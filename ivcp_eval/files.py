"""Files that are either whole or absent, and where data is read and results are written.

Results, reports and data sets are all written through :func:`atomic_write`, so a crash, a kill or a full disk never
leaves a half-written file under its final name and never harms the file that was there before.

A checkout keeps ``datasets/``, ``sweeps/`` and ``results/`` beside the package. A wheel carries the first two inside
the package (``ivcp_eval/shipped``, see pyproject.toml), and results then go to ``results/`` of the current folder.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T")

__all__ = [
    "BASELINES",
    "CHECKOUT",
    "DATASETS",
    "PACKAGE",
    "RESULTS",
    "SWEEPS",
    "DamagedError",
    "DiskFullError",
    "NoLocksError",
    "as_read",
    "as_shown",
    "atomic_write",
    "commit_file",
    "damage_as_clear_error",
    "data_root",
    "disk_full_as_clear_error",
    "file_digest",
    "file_digests",
    "fingerprint",
    "hold_lock",
    "locked",
    "long_cells",
    "read_json",
    "remembered",
    "results_file",
    "room_left",
    "sealed_line",
    "source_files",
    "storable",
    "sweep_file",
    "unsealed_line",
    "write_json",
]

PACKAGE = Path(__file__).resolve().parent
_SHIPPED = PACKAGE / "shipped"

CHECKOUT: Path | None = None if _SHIPPED.is_dir() else PACKAGE.parent
"""Root of the checkout that the package is imported from; None for an installed one."""

DATASETS = (CHECKOUT or _SHIPPED) / "datasets"
SWEEPS = (CHECKOUT or _SHIPPED) / "sweeps"
BASELINES = (CHECKOUT / "results" if CHECKOUT else _SHIPPED) / "baselines"
RESULTS = (CHECKOUT or Path.cwd()) / "results"


def data_root() -> Path:
    """Where VLMEvalKit keeps its TSV files: ``$LMUData``, else ``~/LMUData``; found without importing it."""
    return Path(os.environ.get("LMUData") or Path.home() / "LMUData")  # noqa: SIM112 (VLMEvalKit's name)


#: No space, no quota, or the process may not write longer files (``ulimit -f``).
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


#: A file system that has no locks at all, which is not "somebody else holds it".
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})

#: What reading a file of another shape may raise; RecursionError: brackets within brackets, some thousand deep.
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)


class DiskFullError(OSError):
    """No space (or no quota) was left while a file was being written; nothing was kept of it."""


class NoLocksError(OSError):
    """The file system cannot keep two processes from writing one file."""


class DamagedError(ValueError):
    """A file that this package wrote holds something else now; the message names it and says what to do."""

    def __init__(self, path: Path, reason: str, advice: str) -> None:
        super().__init__(f"{path} is damaged ({reason}); {advice}")


#: What a spreadsheet takes for the beginning of a formula, full-width signs and blanks before it included.
_FORMULA = re.compile(r"'*[\x00\t\r\n]*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20].", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# Controls that move a terminal's cursor or change its colours; tab and line ends are text. The sign itself is doubled.
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u241b]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SEALED = re.compile(rb', "checksum": "([0-9a-f]{16})"\}$')
_SHOWN = re.compile("\u241b(\u241b|[0-9a-f]{2})")


def as_shown(text: str) -> str:
    """A cell of a CSV that people open: no formula for a spreadsheet, no escape sequence for a terminal.

    What would begin a formula gets an apostrophe in front, which spreadsheets hide; a number stays a number. A control
    character becomes ``\u241b`` and two hexadecimal digits. `as_read` is the inverse.
    """
    text = _CONTROL.sub(lambda m: "\u241b" + ("\u241b" if m[0] == "\u241b" else f"{ord(m[0]):02x}"), text)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def storable(text: str) -> str:
    """``text`` as a UTF-8 file can hold it: half a character (a lone surrogate) becomes the replacement character."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def as_read(cell: str) -> str:
    """The text of which `as_shown` made ``cell``; cells that were written plainly are what they are."""
    if cell.startswith("'") and _FORMULA.match(cell):
        cell = cell[1:]
    if "\u241b" not in cell:
        return cell
    return _SHOWN.sub(lambda m: "\u241b" if m[1] == "\u241b" else chr(int(m[1], 16)), cell)


@contextlib.contextmanager
def disk_full_as_clear_error(target: Path, temporary: Path) -> Iterator[None]:
    """Turn "no space left" into :class:`DiskFullError` and remove ``temporary``, which would keep the disk full.

    Other errors pass through unchanged and leave ``temporary`` to the caller.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        temporary.unlink(missing_ok=True)
        if isinstance(error, DiskFullError):  # another file, written within the block, said it already
            raise
        raise DiskFullError(
            error.errno,
            f"the disk (or quota, or limit of file sizes) is full: {target} was not written and its partial data was "
            f"removed; free some space in {target.parent} or choose another folder, then run again",
        ) from error


def room_left(folder: Path) -> bool:
    """Whether a few kilobytes can still be written below ``folder``."""
    probe = folder / f".room.{secrets.token_hex(4)}"
    try:
        probe.write_bytes(bytes(8192))
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def commit_file(temporary: Path, target: Path) -> None:
    """Give a closed, complete file its final name; the rename itself is made durable."""
    temporary.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def atomic_write(
    path: str | os.PathLike[str], mode: str = "w", *, encoding: str = "utf-8", newline: str | None = ""
) -> Iterator[IO[Any]]:
    """Open a file that appears under ``path`` only if the ``with`` block ends without an error.

    Args:
        path: final name; its folder must exist. A symbolic link is followed, not replaced.
        mode: ``"w"`` for text or ``"wb"`` for bytes.
        encoding: for text.
        newline: for text; the default writes ``"\\n"`` as it is on every system.

    Raises:
        ValueError: for any other mode.
        DiskFullError: the disk filled up; the temporary file is gone, an older file under ``path`` is untouched.
        OSError: anything else that goes wrong with the file; same guarantee.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write replaces a whole file: mode must be 'w' or 'wb', got {mode!r}")
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    text_options: dict[str, Any] = {} if mode == "wb" else {"encoding": encoding, "newline": newline}
    try:
        with disk_full_as_clear_error(target, temporary):
            with temporary.open(mode.replace("w", "x"), **text_options) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            commit_file(temporary, target)
    except BaseException:
        # Also on KeyboardInterrupt: a stray temporary file of several hundred MB is nobody's friend.
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes out of the same block for the same ``path``; waits until they are done.

    The lock is the empty file ``.<name>.lock`` beside it, which stays: removing it would let two processes hold it.
    """
    target = Path(path).resolve()
    with target.with_name(f".{target.name}.lock").open("a") as stream:
        hold_lock(stream, target)
        yield


def hold_lock(stream: IO[Any], path: Path, wait: bool = True) -> None:
    """Lock an open file, until it is closed, against other processes that lock it.

    Args:
        path: what is named in the error. wait: until others are done; else BlockingIOError where there are any.

    Raises:
        NoLocksError: the file system has no locks.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise NoLocksError(
            error.errno,
            f"the file system of {path} has no locks ({error.strerror}), without which two processes could write one "
            "file at the same time: choose a folder on another one (--runs, --output, LMUData), or have this one "
            "mounted with locks (Lustre: -o flock)",
        ) from error


@contextlib.contextmanager
def damage_as_clear_error(path: Path, advice: str) -> Iterator[None]:
    """Turn what reading a file of another shape raises into `DamagedError`; ``advice`` says what to do."""
    try:
        yield
    except DamagedError:
        raise
    except DAMAGE as error:
        raise DamagedError(path, f"{type(error).__name__}: {error}", advice) from error


def sealed_line(body: bytes) -> bytes:
    """A line of JSON, an object, with the checksum of all before it as its last member."""
    return body[:-1] + f', "checksum": "{_checksum(body)}"}}\n'.encode()


def unsealed_line(line: bytes) -> bytes:
    """The object of which `sealed_line` made ``line``, whose end of line is gone.

    Raises:
        ValueError: it has no checksum, or was changed since.
    """
    sealed = _SEALED.search(line)
    if not sealed:
        raise ValueError("without its checksum")
    body = line[: sealed.start()] + b"}"
    if _checksum(body) != sealed[1].decode():
        raise ValueError("changed since it was written")
    return body


def _checksum(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]


def _seal(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file that this package wrote; its checksum, where it has one (`write_json`), is left out.

    Raises:
        FileNotFoundError: there is none. DamagedError: it holds something else; the message ends in ``advice``.
    """
    with damage_as_clear_error(path, advice):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"a {type(content).__name__} where an object belongs")
        if "checksum" in content and content.pop("checksum") != _seal(content):
            raise ValueError("changed since it was written")
    return content


def write_json(path: str | os.PathLike[str], value: Any, *, sealed: bool = False) -> None:
    """Write ``value`` as indented JSON, atomically.

    Args:
        sealed: add a key ``checksum`` to the object, by which `read_json` notices that it was changed.

    Raises:
        ValueError: ``value`` holds NaN or infinity, which JSON does not know.
        TypeError: ``value`` holds something JSON cannot express.
    """
    if sealed:
        value = {**value, "checksum": _seal(value)}
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as stream:
        stream.write(text + "\n")


@contextlib.contextmanager
def long_cells() -> Iterator[None]:
    """Let the csv module read cells of any length (pictures, runaway answers); its limit is global, so put it back."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def file_digest(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes, read in pieces (memory does not grow with the file)."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def remembered(path: Path, fact: str, compute: Callable[[Path], T], kind: type[T]) -> T:
    """``compute(path)``, remembered on disk until the file's size, time of change or inode is another.

    Args:
        fact: what is remembered, e.g. "sha256"; its value must be plain JSON. kind: of its value.
    """
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
    cache, key = RESULTS / "cache" / "files.json", f"{path.resolve()}"
    known = _read_cache(cache)
    entry = known.get(key)
    if isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get(fact), kind):
        known_value: T = entry[fact]
        return known_value
    value = compute(path)
    if isinstance(entry, dict) and entry.get("stamp") == stamp:
        entry = {**entry, fact: value}
    else:
        entry = {"stamp": stamp, fact: value}
    with contextlib.suppress(OSError):  # a place that cannot be written to: it is computed again next time
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, {**_read_cache(cache), key: entry})
    return value


def source_files() -> list[Path]:
    """Every source file of this package and of the adapters beside it, sorted."""
    return sorted(path for folder in (PACKAGE, PACKAGE.parent / "model_adapters") for path in folder.rglob("*.py"))


def fingerprint(folder: Path) -> str:
    """A content hash of a checkpoint folder, 12 hexadecimal digits.

    Weights are read whole, once, and remembered by path, size, time of change and inode: fine-tunes differ anywhere.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".model", ".txt", ".jinja", ".py"):  # the last: a checkpoint's own code
            digest.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            digest.update(f"{path.name}/{remembered(path, 'sha256', file_digest, str)}".encode())
    return digest.hexdigest()[:12]


def _read_cache(cache: Path) -> dict[str, Any]:
    try:
        return read_json(cache, "it is made again")
    except (OSError, DamagedError):  # not there yet, or damaged: it is only a cache
        return {}


def file_digests(path: str | os.PathLike[str], *algorithms: str) -> tuple[str, ...]:
    """`file_digest` by several algorithms, the file being read once."""
    digests = [hashlib.new(algorithm, usedforsecurity=False) for algorithm in algorithms]
    with Path(path).open("rb") as stream:
        while piece := stream.read(1 << 20):
            for digest in digests:
                digest.update(piece)
    return tuple(digest.hexdigest() for digest in digests)


def results_file(path: str | Path) -> Path:
    """``path`` itself, or where no such file is, the shipped published numbers (``results/baselines/NAME.csv``)."""
    given = Path(path)
    shipped = BASELINES / given.name
    named_so = given.parts in ((given.name,), ("results", "baselines", given.name))
    return shipped if not given.exists() and named_so and shipped.is_file() else given


def sweep_file(path: str | Path) -> Path:
    """``path`` itself, or where no such file is, the shipped sweep of that name (``smoke``, ``sweeps/smoke.yaml``).

    Raises:
        FileNotFoundError: neither is there.
    """
    given = Path(path)
    shipped = SWEEPS / f"{given.stem}.yaml"
    named_so = given.name == given.stem or given.parts == ("sweeps", shipped.name)
    file = shipped if not given.exists() and named_so and shipped.is_file() else given
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in SWEEPS.glob("*.yaml")))
        raise FileNotFoundError(f"{file} is no sweep file; give the path of one or the name of a shipped one: {names}")
    return file
