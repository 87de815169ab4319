"""Faults of memory, pictures, disks and other processes in sweeps: nothing is lost, nothing is averaged over."""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from ivcp_eval import benchmarks
from ivcp_eval.engine import fork
from ivcp_eval.engine.fork.trunk import Branch, Trunk
from ivcp_eval.interface.records import Answer
from ivcp_eval.reports.table import read_results, read_samples
from ivcp_eval.runs.answering.samples import answer_samples
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.store.journal import Journal
from tests.answers import answer as good
from tests.runs.conftest import Bench, Lab, _child

# -- memory -----------------------------------------------------------------------------------------------------------


def test_out_of_memory_anywhere_at_any_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding, trunk, branches, joining and single runs fail at random; what is left is retried to the same bytes."""
    assert bench.call("run", "--quiet") == 0
    disturbed = bench.elsewhere(bench.folder.parent / "tight")
    bench.spec.write_text(bench.spec.read_text().replace("batch: 1", "batch: 2"))
    draw, share = random.Random(3), [0.35]
    hits: Counter[str] = Counter()
    places: list[tuple[Any, str]] = [
        *((Session, "_encoded"), (Trunk, "prefill"), (Branch, "prefill"), (fork, "join"), (fork, "prune")),
    ]

    def tight(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            if draw.random() < (share[0] / 3 if name.endswith("_encoded") else share[0]):  # it comes before the others
                hits[name] += 1
                raise torch.OutOfMemoryError(f"CUDA out of memory (injected into {name})")
            return call(*arguments, **options)

        return called

    for owner, name in places:
        place = f"{getattr(owner, '__name__', '')}.{name}"
        monkeypatch.setattr(owner, name, tight(place, getattr(owner, name)))
    assert disturbed.call("run", "--quiet") == 1
    bad = [row for row in read_results(disturbed.csv) if row["status"] != "ok"]
    assert bad
    assert all("OutOfMemoryError" in row["reason"] for row in bad)
    for _ in range(30):
        share[0] *= 0.8
        if disturbed.call("run", "--quiet", "--retry-failed") == 0:
            break
    assert len(hits) == len(places), hits
    assert disturbed.results() == bench.results()


def test_batches_are_of_equal_length_and_halved_until_the_culprit_is_alone(tmp_path: Path) -> None:
    for i, side in enumerate([100, 500] * 8):
        Image.new("RGB", (side, side)).save(tmp_path / f"{i:02d}.png")
    samples = [(path.stem, [{"image": str(path)}]) for path in sorted(tmp_path.glob("*.png"))]
    keys = {key for key, _ in samples}
    groups: list[list[str]] = []

    def answer(text: str) -> Answer:
        return good(text)

    def answer_batch(parts: Any, variants: Any, grounding: bool) -> list[list[Answer]]:
        groups.append([Path(part[0]["image"]).stem for part in parts])
        if "05" in groups[-1]:
            raise torch.OutOfMemoryError("injected")
        return [[answer("together") for _ in variants] for _ in parts]

    def answer_all(parts: Any, variants: Any, grounding: bool, exact: bool) -> list[Answer]:
        groups.append([Path(parts[0]["image"]).stem])
        return [answer("alone") for _ in variants]

    session: Any = SimpleNamespace(
        answer_batch=answer_batch,
        answer_all=answer_all,
        placement=SimpleNamespace(dtype="bfloat16"),
        model=torch.nn.Module(),
    )
    cells: Any = [SimpleNamespace(identity=SimpleNamespace(variant=i)) for i in range(2)]
    got = dict(answer_samples(session, samples, keys, cells, grounding=False, exact=False, batch=8))
    assert sorted(got) == [key for key, _ in samples]
    small, large = [f"{i:02d}" for i in range(0, 16, 2)], [f"{i:02d}" for i in range(1, 16, 2)]
    halves = [large, large[:4], large[:2], large[2:4], ["05"], ["07"], large[4:6], large[6:]]
    assert groups == [small, *halves], "four of this length ran out of memory, so four are not tried again"
    raws = {key: {record.prediction for record in records} for key, records in got.items()}
    assert raws == {key: {"alone" if key in ("05", "07") else "together"} for key, _ in samples}
    assert all(record.together for records in got.values() for record in records), "two variants are a batch, too"
    groups.clear()
    rest = dict(answer_samples(session, samples, {"09"}, cells, grounding=False, exact=False, batch=8))
    assert groups == halves, "who goes on after an interruption asks in the same batches"
    assert rest == {key: records for key, records in got.items() if key in large}
    groups.clear()
    exact = dict(answer_samples(session, samples, keys, cells, grounding=False, exact=True, batch=8))
    assert all(len(group) == 1 for group in groups)
    assert not any(record.together for records in exact.values() for record in records)


# -- pictures ---------------------------------------------------------------------------------------------------------

SMALL = """
models: {{tiny: {model}}}
benchmarks: [pictures]
methods: [{{method: fastv, ratios: [0.5]}}]
controls: []
shard: 2
max_new_tokens: 3
timing: false
"""
DECLARED = """
kind: mcq
prompt: dataset
file: pictures.tsv
metrics: [{name: accuracy, file: _acc.csv, column: Overall, factor: 100}]
samples: {file: "_{judge}_result.tsv", column: hit}
"""


def encoded(seed: int, damage: str = "") -> str:
    """A PNG as it stands in a TSV: whole, damaged in the middle (which shows only when it is decoded), or no image."""
    stream = io.BytesIO()
    Image.frombytes("RGB", (56, 56), random.Random(seed).randbytes(56 * 56 * 3)).save(stream, "PNG")
    content = bytearray(stream.getvalue())
    if damage == "middle":
        content[1000:1200] = bytes(200)
    if damage == "all":
        content = bytearray(b"not an image at all, though long enough to be one" * 3)
    return base64.b64encode(content).decode()


@pytest.fixture
def pictures(bench: Bench, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Declare a benchmark of one row for each kind of damage, and make it the sweep's."""
    folder = tmp_path / "datasets"
    folder.mkdir()
    monkeypatch.setattr(benchmarks, "FOLDER", folder)

    def declare(*damages: str) -> None:
        lines = [f"{i}\t{encoded(i, damage)}\tWhich?\tyes\tno\tA" for i, damage in enumerate(damages)]
        (folder / "pictures.yaml").write_text(DECLARED)
        (folder / "pictures.tsv").write_text("\n".join(["index\timage\tquestion\tA\tB\tanswer", *lines]) + "\n")
        bench.spec.write_text(SMALL.format(model=random_model))

    return declare


def test_damaged_pictures_are_errors_with_a_traceback(bench: Bench, pictures: Callable[..., None]) -> None:
    pictures("", "all", "", "middle", "")
    assert bench.call("run", "--quiet") == 1
    for row in read_results(bench.csv):
        assert (row["status"], row["n_samples"], row["n_failed"]) == ("incomplete", 5, 2)
        samples = read_samples(bench.csv.parent / row["predictions"])
        assert [bool(sample["error"]) for sample in samples] == [False, True, False, True, False]
        journal = (bench.csv.parent / row["predictions"]).with_name("journal.jsonl")
        errors = {key: answer for key, answer in Journal(journal).load().items() if answer.error}
        assert len(errors) == 2
        assert all("Traceback (most recent call last)" in answer.traceback for answer in errors.values())
        assert set(errors) >= {"row 1"}
    marks = [json.loads(path.read_text())["failed"] for path in sorted(bench.folder.glob("sweeps/*/done/*.json"))]
    assert marks == [1, 1, 0]
    before = bench.results()
    assert bench.call("run", "--quiet", "--retry-failed") == 1, "damaged they stay"
    assert bench.results() == before, "equal failures are equal bytes"


def test_a_picture_that_could_not_be_read_for_a_while(
    bench: Bench, pictures: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system: it fails while answering and is there again when the cells are scored."""
    from ivcp_eval.vlmeval_bridge import register

    register()
    from ivcp_eval.vlmeval_bridge import evaluate

    pictures("", "", "")
    messages = evaluate.messages

    def away(dataset: Any, prompting: Any, start: int = 0, stop: int | None = None) -> Any:
        for asked in messages(dataset, prompting, start, stop):
            gone = stop is not None and asked.index == "1"
            yield evaluate.PromptRow("1", failure={"error": "OSError: stale file handle"}) if gone else asked

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "messages", away)
        assert bench.call("run", "--quiet") == 1
    assert all((row["status"], row["n_failed"]) == ("incomplete", 1) for row in read_results(bench.csv))
    assert "1 of 3 samples failed (OSError 1), e.g. 1: OSError: stale file" in read_results(bench.csv)[0]["reason"]
    assert bench.call("run", "--quiet", "--retry-failed") == 0
    clean = bench.elsewhere(bench.folder.parent / "clean")
    assert clean.call("run", "--quiet") == 0
    assert clean.results() == bench.results()


# -- disks ------------------------------------------------------------------------------------------------------------


def _limited(arguments: list[str], lmu: str, folder: str, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    _child(arguments, lmu, folder)


@pytest.mark.slow
def test_a_real_limit_of_file_sizes_stops_writing_anywhere(bench: Bench) -> None:
    """The kernel itself cuts a write short: of a journal, a picture, a table, a record or VLMEvalKit's own files."""
    assert bench.call("run", "--quiet") == 0
    disturbed = bench.elsewhere(bench.folder.parent / "limited")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs.preload"])
    longest = max(path.stat().st_size for path in bench.folder.rglob("*") if path.is_file())
    draw, codes = random.Random(5), []
    for _ in range(6):
        arguments = disturbed.arguments("run", "--quiet")
        size = draw.randint(1, longest)
        process = context.Process(target=_limited, args=(arguments, str(bench.lmu), str(Path.cwd()), size))
        process.start()
        process.join(300)
        codes.append(process.exitcode)
    assert codes.count(2) >= 4, f"hardly any run was cut short: {codes}"
    assert set(codes) <= {0, 2}
    assert not list(disturbed.folder.rglob("*.lease"))
    assert disturbed.call("run", "--quiet") == 0
    assert disturbed.results() == bench.results()


# -- other processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_held_journal_is_waited_for(bench: Bench) -> None:
    """`ivcp eval` at the same cell, or a worker that lost its claim: the sweep goes on elsewhere, then finishes."""
    assert bench.call("run", "--quiet") == 0
    other = bench.elsewhere(bench.folder.parent / "other")
    (cell,) = (path.relative_to(bench.folder) for path in bench.folder.glob("runs/tiny/tiny_mcq/fastv-*"))
    # One unit that is being answered, and one cell that is being scored.
    held = [Journal(other.folder / cell / name) for name in ("journal.jsonl", "shards/0000000-0000003.jsonl")]
    with held[0].open():
        with held[1].open():
            process = other.start("run", "--quiet")
            wait(lambda: len(list(other.folder.glob("runs/tiny/tiny_yes_no/*/run.json"))) == 5, process)
            time.sleep(1)
            assert not list(other.folder.glob("runs/tiny/tiny_mcq/*/run.json")), "not one of them is whole"
        wait(lambda: len(list(other.folder.glob("runs/tiny/tiny_mcq/*/run.json"))) == 4, process)
        assert process.exitcode is None
    process.join(120)
    assert process.exitcode == 0
    assert other.results() == bench.results()


def wait(ready: Callable[[], bool], process: Any) -> None:
    end = time.monotonic() + 240
    while not ready():
        assert process.exitcode is None, "the worker gave up"
        assert time.monotonic() < end
        time.sleep(0.1)


def test_exact_never_takes_answers_that_were_made_together(
    bench: Bench, random_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.spec.write_text(bench.spec.read_text() + "dtype: bfloat16\n")
    assert bench.call("run", "--quiet") == 0

    def together() -> Counter[bool]:
        return Counter(json.loads(path.read_text())["together"] for path in bench.folder.glob("runs/*/*/*/run.json"))

    assert together() == {True: 10}
    capsys.readouterr()
    assert bench.call("status") == 0
    out = capsys.readouterr().out
    assert "half precision: " in out
    agree, of = out.split("half precision: ")[1].split()[0:3:2]
    assert int(of) == 4 * 5, "one sample of each unit, under five variants"
    assert 0 <= int(agree) <= 20
    assert bench.call("run", "--quiet", "--exact") == 0
    assert together() == {False: 10}, "all of them were answered again"
    lab = Lab(random_model, bench.folder.parent / "single")
    single = ("--data", "tiny_mcq", "tiny_yes_no", "--limit", "5", "--max-new-tokens", "5", "--dtype", "bfloat16")
    assert lab.eval(*single, "--ratio", "0.75") == 0
    rows = {(row["benchmark"], row["metric"], row["run_id"]): row for row in read_results(bench.csv)}
    for row in lab.rows():
        twin = rows[row["benchmark"], row["metric"], row["run_id"]]
        mine = read_samples(bench.csv.parent / twin["predictions"])
        assert mine == read_samples(lab.csv.parent / row["predictions"]), "exactly those of single runs"
    before = bench.results()
    capsys.readouterr()
    assert bench.call("run") == 0
    assert "answered" not in capsys.readouterr().out, "exact answers serve everybody"
    assert bench.results() == before
