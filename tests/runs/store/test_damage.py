"""Damaged state: said with the file's name, mended by the next run, never a traceback, and never a wrong number."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ivcp_eval.cli import main
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.plan import make
from ivcp_eval.runs.planning.spec import load
from ivcp_eval.runs.records.state import mark
from tests.runs.conftest import SPEC, Bench, Lab

Damage = Callable[[bytes], bytes]

DAMAGES: dict[str, Damage] = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "no object": lambda content: b"[1, 2]",
    "no fields": lambda content: b"{}",
    "binary": lambda content: b"\x80\xff\x00" + content,
    "nul": lambda content: bytes(len(content)),
    "deep": lambda content: b"[" * 100_000,
    "other types": lambda content: json.dumps(
        {key: [] if isinstance(value, str) else "x" for key, value in json.loads(content).items()}
    ).encode(),
}


@pytest.fixture(scope="module")
def finished(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A sweep of two variants on five samples that has ended; tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMUData", str(folder / "LMUData"))
        patch.setenv("OMP_NUM_THREADS", "1")
        (folder / "LMUData").mkdir()
        text = SPEC.format(model=random_model, limit=5).replace("[tiny_mcq, tiny_yes_no]", "[tiny_yes_no]")
        lines = [line for line in text.splitlines() if "ivc_prune" not in line and "downsample" not in line]
        (folder / "small.yaml").write_text("\n".join(lines) + "\n")
        bench = Bench(folder / "small.yaml", folder / "whole", folder / "LMUData")
        assert bench.call("run", "--quiet") == 0
        yield bench


@pytest.fixture
def copy(finished: Bench, tmp_path: Path) -> Bench:
    shutil.copytree(finished.folder, tmp_path / "copy")
    return finished.elsewhere(tmp_path / "copy")


def cell(bench: Bench, method: str = "fastv") -> Path:
    (found,) = bench.folder.glob(f"runs/tiny/tiny_yes_no/{method}*")
    return found


def run_until_whole(bench: Bench, said: str, capsys: pytest.CaptureFixture[str]) -> str:
    """`sweep results` and `sweep run` in turn, as a user would; what was printed."""
    printed = ""
    for verb in ("status", "results", "run", "run"):
        code = bench.call(verb) if verb != "results" else bench.call_results()
        output = capsys.readouterr()
        printed += output.out + output.err
        assert code in (0, 1, 2)
    assert code == 0, printed
    assert said in printed
    return printed


@pytest.mark.parametrize("name", ["run.json", "cell.json", "scores.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_a_cell_is_named_and_made_again(
    copy: Bench, finished: Bench, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cell(copy) / name
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    printed = run_until_whole(copy, f"{path} is damaged" if name != "run.json" else "", capsys)
    assert "Traceback" not in printed
    assert copy.results() == finished.results()
    assert json.loads(path.read_text())


@pytest.mark.parametrize("damage", [lambda text: text[:-40], lambda text: text.replace("Yes", "No"), lambda text: ""])
def test_a_changed_per_sample_file_is_made_again(
    copy: Bench, finished: Bench, damage: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = cell(copy) / "predictions.csv"
    path.write_text(damage(path.read_text().replace("yes", "Yes")))
    assert copy.call_results() == 0
    assert copy.results() == finished.results()


def test_a_damaged_results_file_is_said_before_anything_is_answered(
    finished: Bench, tmp_path: Path, random_model: Path, asked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(random_model, tmp_path)
    lab.csv.parent.mkdir()
    lab.csv.write_text('model,"')
    assert lab.eval("--data", "tiny_yes_no", "--limit", "2") == 2
    said = capsys.readouterr().err
    assert str(lab.csv) in said
    assert "Mend it or move it away" in said
    assert asked == []


def test_a_damaged_record_is_said_by_the_run_that_makes_it_again(
    copy: Bench, finished: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cell(copy) / "run.json"
    path.write_text("{")
    assert copy.call("run") == 0
    assert f"{path} is damaged (JSONDecodeError" in capsys.readouterr().out
    assert copy.results() == finished.results()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_or_note_is_made_again(
    copy: Bench, finished: Bench, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = copy.folder / "sweeps/small/manifest.json"
    manifest.write_bytes(DAMAGES[damage](manifest.read_bytes()))
    for path in (*copy.folder.glob("runs/tiny/tiny_yes_no/prompts/*/*.json"), *copy.folder.glob("runs/code/*.json")):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert copy.call_results() == 2
    assert f"{manifest} is damaged" in capsys.readouterr().err
    shutil.rmtree(cell(copy))
    assert copy.call("run") == 0
    assert copy.results() == finished.results()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_mark_or_count_of_losses_opens_its_unit(
    copy: Bench, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make(load(copy.spec), copy.folder / "runs")
    unit = plan.units()[0]
    path, lost = mark(plan, unit), plan.state / "lost" / f"{unit.name}.json"
    lost.parent.mkdir()
    for file in (path, lost):
        file.write_bytes(DAMAGES[damage](b'{"samples": 3, "answered": 3, "failed": 0, "seconds": 1.0}'))
    (cell(copy) / "run.json").unlink()
    assert copy.call("status") in (0, 1)
    assert copy.call("run") == 0
    if damage != "no fields":  # of which none is needed
        assert f"{path} is damaged" in capsys.readouterr().out


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many variants every sample was answered under."""
    found: list[int] = []
    answer_all = Session.answer_all

    def counted(self: Session, parts: object, variants: list[object], *more: object) -> object:
        found.append(len(variants))
        return answer_all(self, parts, variants, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "answer_all", counted)
    return found


def edited(line: bytes) -> bytes:
    record = json.loads(line)
    other = {"Yes": "No"}.get(record["prediction"], "Yes")
    return line.replace(json.dumps(record["prediction"], ensure_ascii=False).encode(), json.dumps(other).encode(), 1)


LINES: dict[str, tuple[Callable[[bytes], bytes], int]] = {  # what becomes of the second line, and how many it costs
    "edited": (edited, 1),
    "half": (lambda line: line[: len(line) // 2] + b"\n", 1),
    "merged with the next": (lambda line: line.rstrip(b"\n"), 2),
    "binary": (lambda line: b"\x80\xfe\x00\x01\n", 1),
    "NULs": (lambda line: bytes(len(line) - 1) + b"\n", 1),
    "another shape": (lambda line: b'["yes"]\n', 1),
    "deep": (lambda line: b"[" * 100_000 + b"\n", 1),
    "gone": (lambda line: b"", 1),
}


@pytest.mark.parametrize("damage", LINES)
def test_a_damaged_line_of_a_finished_cell_costs_that_line(
    copy: Bench, finished: Bench, asked: list[int], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = cell(copy) / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    change, cost = LINES[damage]
    lines[1] = change(lines[1])
    journal.write_bytes(b"".join(lines))
    assert copy.call_results() == 1
    said = "1 answers are gone" if damage == "gone" else "line 2: "
    printed = capsys.readouterr().out
    assert f"NOT WHOLE: {journal} is damaged ({said}" in printed
    assert "is answered again" in printed
    assert copy.call("run", "--quiet") == 0
    assert asked == [1] * cost, "nothing else is answered again"
    assert copy.results() == finished.results()


@pytest.mark.parametrize("damage", LINES)
def test_a_damaged_line_is_found_before_the_cell_is_scored(
    finished: Bench, tmp_path: Path, asked: list[int], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = finished.elsewhere(tmp_path / "other")
    assert other.call("work", "--quiet", "--no-score") == 0
    del asked[:]
    (shard,) = cell(other).glob("shards/0000000-*.jsonl")
    lines = shard.read_bytes().splitlines(keepends=True)
    change, cost = LINES[damage]
    lines[1] = change(lines[1])
    shard.write_bytes(b"".join(lines))
    assert other.call("run") == 0
    printed = capsys.readouterr().out
    assert f"{cost} answers of tiny__fastv__r0.5 on tiny_yes_no are gone and are made again" in printed
    assert (f"{shard} is damaged (line 2: " in printed) == (damage != "gone")
    assert len(asked) == cost, "under all variants that are open"
    assert other.results() == finished.results()


def test_eval_sees_that_its_answers_were_edited(
    finished: Bench,
    tmp_path: Path,
    random_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab = Lab(random_model, tmp_path)
    request = ("--method", "fastv", "--data", "tiny_yes_no", "--limit", "3")
    assert lab.eval(*request) == 0
    before = lab.csv.read_bytes()
    (journal,) = lab.folder.glob("runs/tiny/tiny_yes_no/fastv-*/journal.jsonl")
    first, rest = journal.read_bytes().split(b"\n", 1)
    journal.write_bytes(edited(first) + b"\n" + rest)
    capsys.readouterr()
    assert lab.eval(*request) == 1
    assert f"NOT WHOLE: {journal} is damaged (line 1: changed since it was written)" in capsys.readouterr().out
    assert lab.eval(*request) == 0
    assert lab.csv.read_bytes() == before


# -- anything, anywhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_anything_done_to_a_results_file_is_a_sentence_or_a_table(
    copy: Bench, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(seed)
    files = (copy.csv, copy.csv.with_suffix(".runs.csv"), cell(copy) / "predictions.csv", cell(copy) / "timing.json")
    for path in files:
        before = path.read_bytes() if path.exists() else b"{}"
        for _ in range(12):
            path.write_bytes(mutated(before, draw))
            assert main(["compare", str(copy.csv)]) in (0, 1, 2)
            said = capsys.readouterr().err
            assert not said or said.startswith("ivcp: ")
        path.write_bytes(before)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Something done to a file: bits turned, a piece cut out, doubled, or replaced by noise."""
    start = draw.randrange(len(content) + 1)
    stop = min(len(content), start + draw.choice((1, 8, 200)))
    piece = content[start:stop]
    noise = [
        draw.randbytes(len(piece)),
        b"",
        piece * 2,
        b"\0" * len(piece),
        b'"',
        b"\n",
        b"null",
        b"[]",
        b"-1",
        b"1e999",
    ]
    return content[:start] + draw.choice(noise) + content[stop:]


@pytest.mark.parametrize("seed", range(4))
def test_anything_done_to_any_file_is_a_sentence_or_the_same_result(
    copy: Bench, finished: Bench, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file of the state takes its turn; `status`, `results` and `run` end in words, and the end is the same."""
    draw = random.Random(seed)
    kinds = ("*.json", "*.jsonl", "*.lease")
    files = sorted(p for pattern in kinds for p in copy.folder.rglob(pattern) if p.name != "spec.json")
    assert len(files) >= 10
    for path in files:
        if not path.exists():  # one that is made again was removed when it was found damaged
            continue
        path.write_bytes(mutated(path.read_bytes(), draw))
        for verb in ("status", "results"):
            code = copy.call(verb) if verb == "status" else copy.call_results()
            assert code in (0, 1, 2)
    for _ in range(3):
        code = copy.call("run", "--quiet", "--retry-failed")
        assert code in (0, 1, 2)
        if code == 0 and copy.results() == finished.results():
            return
    pytest.fail(f"{seed}: {capsys.readouterr()}")
