"""A user's own pictures and questions as a benchmark: a JSONL file (or a TSV) becomes a data file and a checked TSV.

    {"image": "cat.jpg", "question": "What is this?", "answer": "cat"}
    {"video": "cat.mp4", "fps": 1, "question": "What does it do?", "answer": "sleep"}

``image`` is a path, or a list of paths, within the folder of the file. ``video`` is the path of a video file, of which
``nframe`` frames are shown (default 8), or ``fps`` a second; or it is a folder of pictures, or a list of them, with
``seconds``, when each is shown. Files are decoded once here: what cannot be is said now, and the frames that a run
decodes must be the same ones. Optional are ``answer`` (a text, or a list of
texts of which any counts), ``options`` (a list, or a mapping of letters), ``category`` and ``index``. Without answers
the score is the agreement with the unpruned model. Nothing is written unless every line is good.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import io
import json
import math
import os
import re
import secrets
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ivcp_eval import benchmarks, vlmeval_bridge
from ivcp_eval.benchmarks import agreement, clips
from ivcp_eval.benchmarks.pictures import decoded
from ivcp_eval.files import atomic_write, commit_file, data_root, disk_full_as_clear_error, file_digest, remembered
from ivcp_eval.vlmeval_bridge.reading import tsv, videos

KINDS = ("mcq", "yes_no", "grounding", "short_answer")
PROMPTS = ("family", "dataset")  # whose wording is sent; the first where nothing is said
#: A line holds paths and words, no pictures.
MOST_BYTES_A_LINE = 1 << 20
MOST_BYTES_A_PICTURE = 64 << 20
#: Pillow's own limit, which VLMEvalKit raises for the whole process.
MOST_PIXELS = 178_956_970
MOST_PROBLEMS = 20

_ORIENTATION = 0x0112  # tag of EXIF
_SHOWN = ("image", "video", "nframe", "fps", "seconds")
_KEYS = (*_SHOWN, "question", "answer", "options", "category", "index")
_VIDEO = ("video", "nframe", "fps", "frame_seconds", "frames_sha256", "decoder")
_FRAMES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of a folder that is a video
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_BOX = re.compile(rf"\s*[\[(]?\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*[\])]?\s*")
# VLMEvalKit's evaluators score data sets with these words in their names in other ways.
_SPECIAL = ("MME", "MMT", "MMSci", "AMBER", "Hallusion", "POPE", "VSR-zeroshot")
_SPECIAL_FOLDED = ("mmbench", "ccbench", "circular", "mmcr")
_METRICS: Mapping[str, tuple[list[dict[str, Any]], dict[str, str]]] = {
    "mcq": (
        [{"name": "accuracy", "file": "_acc.csv", "column": "Overall", "factor": 100}],
        {"file": "_{judge}_result.tsv", "column": "hit"},
    ),
    "yes_no": (
        [{"name": "accuracy", "file": "_score.csv", "column": "Overall"}],
        {"file": "_auxmatch.tsv", "column": "score"},
    ),
    "grounding": (
        [
            {"name": "Acc@0.5", "file": "_acc.csv", "column": "Acc@0.5"},
            {"name": "Acc@0.75", "file": "_acc.csv", "column": "Acc@0.75"},
            {"name": "mean_iou", "file": "_acc.csv", "column": "mean_iou", "factor": 100},
        ],
        {"file": "_results.csv", "column": "hit"},
    ),
    "short_answer": (
        [{"name": "accuracy", "file": "_acc.csv", "column": "Overall"}],
        {"file": "_results.csv", "column": "eval_score"},
    ),
}


class BadData(ValueError):
    """A file that cannot be a benchmark; every bad line is named with file, line number and what is expected."""


@dataclass
class _Line:
    """One question.

    Attributes:
        number: of the line, or of a TSV's row. pictures: paths, or the pictures themselves; none where a file is shown.
        video: the file, and how it is sampled. seconds: of pictures that are frames, when each is shown.
        answers: empty if there is none. box: an answer that is four numbers. options: letter -> text.
    """

    number: int
    index: str
    question: str
    pictures: list[Path] | list[bytes]
    video: tuple[Path, clips.Sampling] | None = None
    seconds: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    box: tuple[float, ...] | None = None
    options: dict[str, str] = field(default_factory=dict)
    category: str = ""


def is_prepared(word: str) -> bool:
    """Whether a word names a benchmark, or a file of which one of its name was made before."""
    return not benchmarks.is_file_name(word) or (benchmarks.own_folder() / f"{Path(word).stem}.tsv").is_file()


def names_of(words: Sequence[str], say: Callable[[str], None]) -> list[str]:
    """Benchmark names as they are, and files as the benchmarks that `add` makes of them. Raises as `add`."""
    return [add(Path(word), say=say) if benchmarks.is_file_name(word) else word for word in words]


def add(
    path: Path, name: str = "", kind: str = "", prompt: str = "", say: Callable[[str], None] = lambda text: None
) -> str:
    """Make a benchmark of a file; the one that is there is kept if nothing changed.

    Args:
        name: of the benchmark; default: the file's name without ending. kind: of question; default: what the answers
            are, or what the benchmark was before, if all lines fit that. prompt: "family" wraps questions in
            the model's wording of their kind, "dataset" sends them as they stand; default: as before, else "family".
            say: is told what was made.

    Returns:
        The name.

    Raises:
        FileNotFoundError: no such file. BadData: what is wrong with it, or with the name.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not here, or is no file; a .jsonl or .tsv file of pictures is expected")
    if not benchmarks.is_file_name(path.name):
        raise BadData(f"{path}: the name of a file of pictures ends in {' or '.join(benchmarks.OWN_SUFFIXES)}")
    name = name or path.stem
    source = str(path.resolve())
    _check_name(name, source)
    known = benchmarks.data_file(name)
    before = benchmarks.load(name) if known.is_file() else None
    prompt = prompt or (before.prompt if before else "family")
    if prompt not in PROMPTS:
        raise BadData(f"unknown prompt {prompt!r}; allowed: {', '.join(PROMPTS)}")
    lines, problems = _read_tsv(path) if path.suffix.lower() == ".tsv" else _read_jsonl(path)
    if not lines and not problems:
        raise BadData(f"{path}: the file has no lines")
    if before and before.kind and not any(_misfit(line, before.kind) for line in lines):
        kind = kind or before.kind
    kind_of_all = "" if problems else _kind(path, lines, kind, problems)
    folder = benchmarks.own_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.tsv"
    part = target.with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with disk_full_as_clear_error(target, part):
            _write(path, part, lines, kind_of_all, problems)
        if problems:
            raise BadData("\n".join([*problems[:MOST_PROBLEMS], *_and_more(problems), "nothing was written"]))
        _check_table(path, part, lines)
        text = _data_file(source, lines, kind_of_all, prompt, file_digest(part))
        if known.is_file() and target.is_file() and known.read_text(encoding="utf-8") == text:
            return name
        changed = known.is_file()
        commit_file(part, target)
        with atomic_write(folder / f"{name}.yaml") as stream:
            stream.write(text)
    finally:
        part.unlink(missing_ok=True)
    note = "" if lines[0].answers else f"; it has no answers, so its score is the {agreement.NOTE}"
    said = "replaced, since its file changed (earlier results stay as they are)" if changed else "added"
    say(f"{name}: {said}: {len(lines)} questions of the kind {kind_of_all}{note}")
    return name


def _check_name(name: str, source: str) -> None:
    advice = f"give it another name: `ivcp data add {source} --name NAME`"
    if not _NAME.fullmatch(name):
        raise BadData(f"{name!r} is no name of a benchmark: up to 80 letters, digits, - and _; {advice}")
    if any(word in name for word in _SPECIAL) or any(word in name.lower() for word in _SPECIAL_FOLDED):
        words = ", ".join((*_SPECIAL, *_SPECIAL_FOLDED))
        raise BadData(f"{name!r}: VLMEvalKit scores names with these words in ways of their own ({words}); {advice}")
    known = benchmarks.data_file(name)
    if known.parent == benchmarks.own_folder():
        earlier = benchmarks.load(name).source
        if earlier != source:
            raise BadData(f"a benchmark {name!r} was made of {earlier} before; {advice}, or remove {known}")
        return
    taken = {word.lower() for word in (*benchmarks.names(), *benchmarks.groups(), benchmarks.OWN)}
    if name.lower() in taken or vlmeval_bridge.knows(name):
        raise BadData(f"{name!r} is a benchmark or group already, or a file in {data_root()}, which runs by name; "
                      f"{advice}")  # fmt: skip


def _word(path: Path) -> str:
    return "row" if path.suffix.lower() == ".tsv" else "line"


def _and_more(problems: Sequence[str]) -> list[str]:
    return [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []


# -- reading ----------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> tuple[list[_Line], list[str]]:
    """The lines that are good, and what is wrong with the others; blank lines do not count."""
    return _gathered(path, "line", ((n, partial(_jsonl_line, path, n, content)) for n, content in _lines(path)))


def _jsonl_line(path: Path, number: int, content: bytes) -> _Line:
    return _line(path, number, _parsed(content))


def _gathered(
    path: Path, what: str, entries: Iterable[tuple[int, Callable[[], _Line]]]
) -> tuple[list[_Line], list[str]]:
    """The entries that are good, and what is wrong with the others.

    Args:
        what: an entry is called. entries: the number of each, and what reads it or raises ValueError.
    """
    lines: list[_Line] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for number, make in entries:
        try:
            line = make()
        except ValueError as error:
            problems.append(f"{path}, {what} {number}: {error}")
            continue
        if line.index in seen:
            problems.append(f"{path}, {what} {number}: index {line.index!r} is that of {what} {seen[line.index]} too")
        seen.setdefault(line.index, number)
        lines.append(line)
    return lines, problems


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with path.open("rb") as stream:
        while content := stream.readline(MOST_BYTES_A_LINE + 1):
            number += 1
            if len(content) > MOST_BYTES_A_LINE:
                raise BadData(f"{path}, line {number}: more than {MOST_BYTES_A_LINE} bytes; pictures are named by path")
            if content.strip():
                yield number, content.removeprefix(b"\xef\xbb\xbf") if number == 1 else content


def _parsed(content: bytes) -> Mapping[str, Any]:
    try:
        entry = json.loads(content.decode(), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{content[error.start]:02x} is not UTF-8 text; save the file as UTF-8") from None
    except RecursionError:
        raise ValueError("brackets within brackets, too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error}); a whole object is expected on every line") from None
    if not isinstance(entry, dict):
        raise ValueError(f"an object with image and question is expected, got a {type(entry).__name__}")
    return entry


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        raise ValueError("a key stands twice")
    return entry


def _line(path: Path, number: int, raw: Mapping[str, Any]) -> _Line:
    if unknown := sorted(set(raw) - set(_KEYS)):
        raise ValueError(f"unknown {', '.join(map(repr, unknown))}; allowed: {', '.join(_KEYS)}")
    line = _Line(number, _index(raw, number), _text("question", raw.get("question")), [])
    _show(line, path, raw)
    line.answers, line.box = _answers(raw["answer"]) if raw.get("answer") is not None else ([], None)
    line.options = _options(raw["options"]) if raw.get("options") is not None else {}
    line.category = _text("category", raw["category"]) if raw.get("category") is not None else ""
    return line


def _show(line: _Line, path: Path, raw: Mapping[str, Any]) -> None:
    """Note what the question is about: pictures, frames with their times, or a file."""
    if ("image" in raw) == ("video" in raw):
        raise ValueError("either image or video is expected: a path, or a list of paths")
    key = "image" if "image" in raw else "video"
    named = _named(path, key, raw[key])
    files = _paths(path, key, named)
    if "video" in raw and ("seconds" in raw or len(files) > 1 or isinstance(raw["video"], list)):
        stated, line.pictures = raw.get("seconds", []), files
        if not isinstance(stated, list) or not all(_is_number(at) for at in stated):
            raise ValueError(f"seconds must be a list of numbers, got {str(stated)[:80]!r}")
        clips.check_times(len(files), stated)
        line.seconds = [float(at) for at in stated]
    elif "video" in raw:
        sampled = {name: raw[name] for name in ("nframe", "fps") if name in raw} or {"nframe": clips.DEFAULT_FRAMES}
        line.video = files[0], clips.Sampling(**sampled)
    else:
        line.pictures = files
    of_file = [name for name in ("nframe", "fps") if name in raw and line.video is None]
    if of_file or ("seconds" in raw and not line.seconds):
        what = "frames" if line.seconds else "a file" if line.video else "an image"
        raise ValueError(f"{', '.join(of_file) or 'seconds'} cannot be said of {what}")


def _named(path: Path, key: str, raw: Any) -> list[str]:
    """The paths of a line; of a folder those of its pictures, by name."""
    listed = raw if isinstance(raw, list) else [raw]
    named = [name for name in listed if isinstance(name, str) and name]
    if not named or len(named) < len(listed):
        raise ValueError(f"{key} must be a path, or a list of paths")
    if key == "video" and isinstance(raw, str) and "\0" not in raw and (folder := path.parent / raw).is_dir():
        inside = (file for file in folder.iterdir() if file.suffix.lower() in _FRAMES)
        named = [f"{raw}/{file.name}" for file in sorted(inside)]
        if not named:
            raise ValueError(f"video {raw!r}: no pictures ({', '.join(_FRAMES)}) in this folder")
    return named


def _index(raw: Mapping[str, Any], number: int) -> str:
    index = raw.get("index", number)
    if isinstance(index, bool) or not isinstance(index, str | int):
        raise ValueError(f"index must be a text or a whole number, got {index!r}")
    return _text("index", str(index))


def _text(key: str, value: Any) -> str:
    """A text that a table can hold."""
    if isinstance(value, int | float) and not isinstance(value, bool) and key != "question":
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{key} must be a text that is not empty, got {str(value)[:80]!r}")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{key} holds a NUL or half a character")
    return value.replace("\r\n", "\n").replace("\r", "\n")


def _paths(path: Path, key: str, named: Sequence[str]) -> list[Path]:
    folder, paths = path.resolve().parent, []
    for name in named:
        try:
            picture = (folder / name).resolve()
            there = picture.is_file()
        except (ValueError, OSError) as error:  # a NUL byte; a name that is too long
            raise ValueError(f"{key} {name[:80]!r}: {error}") from None
        if not picture.is_relative_to(folder):
            raise ValueError(f"{key} {name!r} leads out of {folder}; {key}s lie beside the file, or in folders below")
        if not there:
            raise ValueError(f"{key} {name!r}: there is no such file in {folder}")
        paths.append(picture)
    return paths


def _answers(raw: Any) -> tuple[list[str], tuple[float, ...] | None]:
    """The true answers, and the box that they are, if they are one."""
    listed = raw if isinstance(raw, list) else [raw]
    if not listed:
        raise ValueError("answer is an empty list; leave it out where there is none")
    if isinstance(raw, list) and len(raw) == 4 and all(_is_number(value) for value in raw):
        return [str(raw)], tuple(map(float, raw))
    texts = [_text("answer", value) for value in listed]
    match = _BOX.fullmatch(texts[0]) if len(texts) == 1 else None
    return texts, tuple(map(float, match.groups())) if match else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _options(raw: Any) -> dict[str, str]:
    options = dict(zip(string.ascii_uppercase, raw, strict=False)) if isinstance(raw, list) else raw
    letters = list(string.ascii_uppercase[: len(raw)]) if isinstance(raw, list | dict) else []
    if not isinstance(options, dict) or sorted(options) != letters or not 2 <= len(raw) <= 26:
        raise ValueError("options must be a list of 2 to 26 texts, or a mapping of A, B, ... to texts")
    return {letter: _text(f"option {letter}", options[letter]) for letter in letters}


def _read_tsv(path: Path) -> tuple[list[_Line], list[str]]:
    """A TSV with the pictures in it: index, image (base64), question; answer, A, B, ... and category if it has them."""
    table = tsv.read(path)
    if missing := [column for column in ("index", "image", "question") if column not in table]:
        raise BadData(f"{path}: no column {', '.join(missing)}; found: {', '.join(map(str, table.columns))}")
    if "video" in table:
        raise BadData(f"{path}: files of videos are named in a .jsonl file, see `ivcp data add --help`")
    rows = [{str(column): str(cell) for column, cell in row.items()} for row in table.to_dict("records")]
    cells = {row["index"]: row["image"] for row in rows}
    return _gathered(path, "row", ((n, partial(_tsv_line, n, row, cells)) for n, row in enumerate(rows, 1)))


def _tsv_line(number: int, row: Mapping[str, str], cells: Mapping[str, str]) -> _Line:
    options = [row[letter] for letter in string.ascii_uppercase if row.get(letter)]
    line = _Line(number, row["index"], _text("question", row["question"]), _base64(row["image"], cells))
    line.answers, line.box = _cell_answers(row["answer"]) if row.get("answer") else ([], None)
    line.options = _options(options) if options else {}
    line.category = row.get("category", "")
    if row.get("seconds"):
        line.seconds = videos.times(row["seconds"])
        clips.check_times(len(line.pictures), line.seconds)
    return line


def _base64(cell: str, cells: Mapping[str, str]) -> list[bytes]:
    """The pictures of a cell, which may be the index of another row."""
    cell = cells.get(cell, cell)
    texts = ast.literal_eval(cell) if cell.startswith("[") else [cell]  # `tsv.read` let only lists of texts through
    try:
        return [base64.b64decode(text, validate=True) for text in texts]
    except (binascii.Error, TypeError) as error:
        raise ValueError(f"image is not base64 ({error})") from None


def _cell_answers(cell: str) -> tuple[list[str], tuple[float, ...] | None]:
    """A cell in brackets is a list of answers, as everywhere in a TSV."""
    try:
        listed = json.loads(cell) if cell.startswith("[") else cell
    except json.JSONDecodeError:
        listed = cell
    return _answers(listed)


# -- kind and table ---------------------------------------------------------------------------------------------------


def _kind(path: Path, lines: Sequence[_Line], stated: str, problems: list[str]) -> str:
    """What all lines are; lines that are not go to ``problems``."""
    if stated not in ("", *KINDS):
        raise BadData(f"unknown kind {stated!r}; allowed: {', '.join(KINDS)}")
    word = _word(path)
    answered = [line for line in lines if line.answers]
    if answered and len(answered) < len(lines):
        without = next(line.number for line in lines if not line.answers)
        problems.append(f"{path}, {word} {without}: no answer, but other {word}s have one; give all of them or none")
    of_files = [line for line in lines if line.video]
    if of_files and len(of_files) < len(lines):
        other = next(line.number for line in lines if not line.video)
        problems.append(f"{path}, {word} {other}: pictures, but other {word}s show video files; part them in two files")
    if stated:
        kind = stated
    elif any(line.options for line in lines):
        kind = "mcq"
    elif answered and all(_is_yes_no(line) for line in answered):
        kind = "yes_no"
    elif answered and all(line.box for line in answered):
        kind = "grounding"
    else:
        kind = "short_answer"
    for line in lines:
        if problem := _misfit(line, kind):
            problems.append(f"{path}, {word} {line.number}: {problem}")
    return kind


def _is_yes_no(line: _Line) -> bool:
    return len(line.answers) == 1 and line.answers[0].strip().lower() in ("yes", "no")


def _misfit(line: _Line, kind: str) -> str:
    """Why a line is no question of a kind, in words; empty if it is."""
    if bool(line.options) != (kind == "mcq"):
        return "no options, which multiple choice needs on every line" if kind == "mcq" else f"options, but kind {kind}"
    boxless = kind == "grounding" and (len(line.pictures) != 1 or bool(line.seconds))
    if not line.answers:
        return "a box is asked of one picture" if boxless else ""
    if kind == "mcq" and _letter(line) is None:
        return f"answer {line.answers[0][:80]!r} is neither a letter of the options nor the text of one of them"
    if kind == "yes_no" and not _is_yes_no(line):
        return f"answer {line.answers[0][:80]!r} is neither yes nor no"
    if kind == "grounding" and line.box is None:
        return f"answer {line.answers[0][:80]!r} is no box: four numbers x1, y1, x2, y2 in pixels"
    return "a box is asked of one picture" if boxless else ""


def _letter(line: _Line) -> str | None:
    """Of the right option, which the answer names or spells out."""
    if len(line.answers) != 1:
        return None
    answer = line.answers[0].strip()
    if answer in line.options:
        return answer
    spelled = [letter for letter, text in line.options.items() if text.strip() == answer]
    return spelled[0] if len(spelled) == 1 else None


def _write(path: Path, part: Path, lines: Sequence[_Line], kind: str, problems: list[str]) -> None:
    """The table; pictures that cannot be read go to ``problems``."""
    letters = sorted({letter for line in lines for letter in line.options})
    columns = ["index", *(_VIDEO if any(line.video for line in lines) else ("image",)), "question", *letters]
    columns += ["seconds"] if any(line.seconds for line in lines) else []
    columns += ["answer"] if any(line.answers for line in lines) else []
    columns += ["category"] if any(line.category for line in lines) else []
    columns += ["width", "height"] if kind == "grounding" else []
    with part.open("x", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for line in lines:
            try:
                shown = _of_file(*line.video) if line.video else _of_pictures(line, kind)
            except ValueError as error:
                problems.append(f"{path}, {_word(path)} {line.number}: {error}")
                continue
            if not problems:
                writer.writerow(
                    {
                        **{"index": line.index, "question": line.question, "category": line.category},
                        **{"answer": _answer(line, kind), **line.options, **shown},
                    }
                )


def _of_pictures(line: _Line, kind: str) -> dict[str, Any]:
    """The cells of pictures that can be decoded; of frames also their times."""
    pictures = [_picture(picture) for picture in line.pictures]
    width, height = pictures[0][1]
    _check_box(line, kind, width, height)
    sizes = {size for _, size in pictures}
    if line.seconds and len(sizes) > 1:
        raise ValueError(f"the frames of a video have the sizes {sorted(sizes)}; make them one")
    texts = [base64.b64encode(content).decode("ascii") for content, _ in pictures]
    image = texts[0] if len(texts) == 1 else str(texts)
    seconds = json.dumps(line.seconds) if line.seconds else ""
    return {"image": image, "width": width, "height": height, "seconds": seconds}


def _of_file(path: Path, sampling: clips.Sampling) -> dict[str, Any]:
    """The cells of a video file, which is decoded, or was before by the same decoder."""
    decoder = clips.decoder()

    def facts(file: Path) -> dict[str, Any]:
        clip = clips.decode(file, sampling)
        return {"frames_sha256": clip.digest, "frame_seconds": json.dumps([round(at, 6) for at in clip.seconds])}

    known = remembered(path, f"{sampling} {decoder}", facts, dict)
    return {"video": str(path), "nframe": sampling.nframe or "", "fps": sampling.fps or "", **known, "decoder": decoder}


def _picture(source: Path | bytes) -> tuple[bytes, tuple[int, int]]:
    """(bytes, size) of a picture that can be decoded. One that a camera turned by a tag is turned in earnest."""
    from PIL import Image, ImageOps

    name = f"picture {source.name}" if isinstance(source, Path) else "picture"
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size > MOST_BYTES_A_PICTURE:
        raise ValueError(f"{name} has {size} bytes, more than {MOST_BYTES_A_PICTURE}; make it smaller")
    content = source.read_bytes() if isinstance(source, Path) else source
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS}; make it smaller")
            if image.getexif().get(_ORIENTATION, 1) != 1:
                buffer = io.BytesIO()
                decoded(ImageOps.exif_transpose(image)).save(buffer, "PNG")
                content = buffer.getvalue()
        return content, decoded(io.BytesIO(content)).size
    except Exception as error:  # decoders meet damaged bytes with errors of every kind
        raise ValueError(f"{name} cannot be used ({type(error).__name__}: {error})") from error


def _check_box(line: _Line, kind: str, width: int, height: int) -> None:
    if kind != "grounding" or line.box is None:
        return
    x1, y1, x2, y2 = line.box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ValueError(
            f"answer {list(line.box)} is no box in the picture of {width} x {height} pixels: 0 <= x1 < x2 <= width and "
            "0 <= y1 < y2 <= height"
        )


def _answer(line: _Line, kind: str) -> str:
    """The cell that the kind's evaluator reads."""
    if not line.answers:
        return ""
    if kind == "mcq":
        return _letter(line) or ""
    if kind == "yes_no":
        return line.answers[0].strip().capitalize()
    if kind == "grounding" and line.box:
        return json.dumps(list(line.box))
    # What begins with a bracket would be read as a list.
    return line.answers[0] if len(line.answers) == 1 and line.answers[0][0] != "[" else str(line.answers)


def _check_table(path: Path, part: Path, lines: Sequence[_Line]) -> None:
    """Read the table as a run will; what is refused is said of the file that it was made of."""
    try:
        tsv.read(part)
    except tsv.BadTable as error:
        text = re.sub(r", row (\d+)", lambda match: f", {_word(path)} {lines[int(match[1]) - 1].number}", str(error))
        raise BadData(text.replace(str(part), str(path)) + "; nothing was written") from error


def _data_file(source: str, lines: Sequence[_Line], kind: str, prompt: str, digest: str) -> str:
    """The data file, every value as JSON, which is YAML that nothing is read into."""
    answered, of_files = bool(lines[0].answers), bool(lines[0].video)
    sampling = "rows" if of_files else "frames" if any(line.seconds for line in lines) else ""
    what = "videos" if of_files else "pictures"
    metrics, samples = _METRICS[kind]
    if not answered:
        names = agreement.BOX_METRICS if kind == "grounding" else agreement.TEXT_METRICS
        metrics, samples = [{"name": name, "file": "", "column": name} for name in names], {}
    values: dict[str, Any] = {
        "title": f"own {what}{'' if answered else '; agreement with the unpruned model'}",
        "kind": kind,
        **({"prompt": prompt} if prompt != PROMPTS[0] else {}),
        **({"sampling": sampling} if sampling else {}),
        "sha256": digest,
        "n_samples": len(lines),
        "reference": "answers" if answered else "baseline",
        "metrics": metrics,
        **({"samples": samples} if samples else {}),
        "cluster": "image",
        "source": source,
    }
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
