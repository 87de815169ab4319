"""Lost GPUs, models and evaluators that fail, records that vanish: what is done again, and what is not."""

from __future__ import annotations

import base64
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ivcp_eval.interface import Unsupported, failures
from ivcp_eval.methods import fastv
from ivcp_eval.reports.table import Row, read_results
from ivcp_eval.runs import worker as work
from ivcp_eval.runs.answering import samples
from ivcp_eval.runs.answering import session as sessions
from ivcp_eval.runs.answering.samples import DeviceLost
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.executors import local, slurm
from ivcp_eval.runs.store.journal import Journal
from tests.runs.conftest import Bench, Lab


def unwhole(bench: Bench) -> list[tuple[str, str, str]]:
    """(method, benchmark, status) of the rows without a score."""
    rows: list[Row] = read_results(bench.csv)
    return sorted((row["method"], row["benchmark"], row["status"]) for row in rows if row["status"] != "ok")


# -- a lost GPU -------------------------------------------------------------------------------------------------------


def test_a_sticky_error_is_told_from_others_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device("cuda", 1))])
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    assert not failures.device_lost(gpu), "an error that is over: memory, a wrong launch"

    def sticky(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", sticky)
    assert failures.device_lost(gpu)
    assert asked == [torch.device("cuda", 1)]
    assert not failures.device_lost(torch.nn.Linear(1, 1)), "a CPU is not lost"


@dataclasses.dataclass
class Poison:
    """FastV on one sample ruins the GPU of the process: every later call fails, until a new process begins."""

    bench: Bench
    active: bool = True
    lost: bool = False
    sample: Any = None
    asked: int = 0

    def process(self, *arguments: str) -> int:
        self.lost, self.asked = False, 0
        return self.bench.call("run", "--quiet", *arguments)


@pytest.fixture
def poison(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Poison:
    state = Poison(bench)
    answer_all = Session.answer_all

    def poisoned(self: Session, parts: Any, variants: Any, *more: Any) -> Any:
        state.asked += 1
        if state.sample is None and state.asked == 2:
            state.sample = parts
        state.lost |= state.active and parts == state.sample and any(v.method == "fastv" for v in variants)
        if state.lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore of it")
        return answer_all(self, parts, variants, *more)

    monkeypatch.setattr(Session, "answer_all", poisoned)
    monkeypatch.setattr(samples, "device_lost", lambda model: state.lost)
    return state


def test_a_lost_gpu_ends_the_worker_and_no_answer_is_tried_for_ever(
    poison: Poison, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = poison.bench
    assert poison.process() == 75
    out = capsys.readouterr().out
    assert "lost its GPU (AcceleratorError: CUDA error: an illegal memory access was encountered) and ends" in out
    assert poison.asked == 2, "nothing is asked of a process without a GPU"
    assert not list(bench.folder.rglob("*.lease")), "others may go on at once"
    assert poison.process() == 75
    assert poison.asked == 4, "the five variants alone: the fourth is the cause"
    assert poison.process() == 1
    assert poison.asked == 1 + 8, "the fifth alone, then the other samples"
    assert unwhole(bench) == [("fastv", poison_benchmark(bench), "incomplete")]
    (bad,) = [row for row in read_results(bench.csv) if row["status"] != "ok"]
    assert bad["n_failed"] == 1
    assert "AcceleratorError 1" in bad["reason"]
    assert poison.process() == 1
    assert poison.asked == 0, "it stays as it is"
    assert [poison.process("--retry-failed"), poison.process(), poison.process()] == [75, 75, 1], "asked to, twice more"
    poison.active = False
    assert poison.process("--retry-failed") == 0
    clean = bench.elsewhere(bench.folder.parent / "clean")
    assert clean.call("run", "--quiet") == 0
    assert clean.results() == bench.results()


def poison_benchmark(bench: Bench) -> str:
    """The benchmark that is answered first."""
    return str(read_results(bench.csv)[0]["benchmark"])


def test_a_batch_that_costs_a_gpu_is_answered_one_by_one(poison: Poison, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = poison.bench
    bench.spec.write_text(bench.spec.read_text().replace("batch: 1", "batch: 3"))
    answer_batch = Session.answer_batch

    def poisoned(self: Session, conversations: Any, *more: Any) -> Any:
        poison.sample = poison.sample or conversations[1]
        if poison.active and poison.sample in conversations:
            poison.lost = True
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        return answer_batch(self, conversations, *more)

    monkeypatch.setattr(Session, "answer_batch", poisoned)
    assert [poison.process() for _ in range(3)] == [75, 75, 1]
    assert [row["n_failed"] for row in read_results(bench.csv) if row["status"] != "ok"] == [1]
    poison.active = False
    assert poison.process("--retry-failed") == 0
    clean = bench.elsewhere(bench.folder.parent / "clean")
    assert clean.call("run", "--quiet") == 0
    assert clean.results() == bench.results()


def test_processes_without_a_gpu_are_started_again_but_not_for_ever(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local, "MOST_RESTARTS", 2)
    started: list[str] = []

    def start(arguments: list[str], log: Path, threads: int = 0) -> subprocess.Popen[bytes]:
        started.append(log.stem)
        code = local.LOST if log.stem == "worker-1" or started.count(log.stem) == 1 else 0
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"])

    monkeypatch.setattr(local, "_start", start)
    assert bench.call("run", "--quiet", "--workers", "2") == 1
    assert (started.count("worker-0"), started.count("worker-1")) == (2, 3)
    out = capsys.readouterr().out
    assert out.count("lost its GPU and is started again") == 3
    assert f"worker 1 ended with {local.LOST}" in out
    assert "10 cells of small have no record yet" in out


def test_a_slurm_task_without_a_gpu_is_requeued_but_not_for_ever(
    bench: Bench, random_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any, **__: Any) -> Any:
        raise DeviceLost(torch.AcceleratorError("CUDA error: unspecified launch failure"), [], [])

    requeued: list[int] = []
    monkeypatch.setattr(work, "work", lost)
    monkeypatch.setattr(slurm, "requeue", lambda: requeued.append(1))
    task = slurm.Task(str(bench.spec), str(bench.folder / "runs"), "tiny", "cpu")
    for restart in (0, slurm.MOST_RESTARTS - 1, slurm.MOST_RESTARTS):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        with pytest.raises(DeviceLost, match="unspecified launch failure"):
            task()
    assert len(requeued) == 2


def test_eval_ends_with_its_gpu_and_goes_on_in_the_next_process(
    bench: Bench, random_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered\nmore of it")

    lab = Lab(random_model, bench.folder)
    single = ("--data", "tiny_mcq", "--limit", "2", "--ratio", "0.5")
    with monkeypatch.context() as patch:
        for name in ("answer_all", "answer_batch"):
            patch.setattr(Session, name, lost)
        patch.setattr("ivcp_eval.runs.answering.samples.device_lost", lambda model: True)
        assert lab.eval(*single) == 75
    assert "lost its GPU (AcceleratorError: CUDA error: device-side assert triggered)" in capsys.readouterr().out
    assert not lab.csv.exists()
    assert lab.eval(*single) == 0


# -- models, plug-ins and evaluators ----------------------------------------------------------------------------------


def test_a_model_that_cannot_be_loaded_ends_no_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory while loading")

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "timed_load", load)
        assert bench.call("run", "--quiet") == 1
        out = capsys.readouterr().out
        assert "tiny could not be loaded, so nothing of it is answered: OutOfMemoryError: CUDA out of memory" in out
        assert "10 cells of small have no record yet" in out
        assert bench.call("work", "--quiet") == 1
        with pytest.raises(RuntimeError, match="tiny could not be loaded"):
            slurm.Task(str(bench.spec), str(bench.folder / "runs"), "tiny", "cpu")()
    assert bench.call("run", "--quiet") == 0


def test_a_benchmark_that_cannot_be_read_ends_no_worker(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    table = bench.lmu / "RefCOCO_val.tsv"
    picture = base64.b64encode(b"no picture, but as long as one" * 9).decode()
    rows = [f"{i}\tq\t[0, 0, 9, 9]\t20\t20\t{cell}\n" for i, cell in enumerate([picture, ""])]
    table.write_text("index\tquestion\tanswer\twidth\theight\timage\n" + "".join(rows))
    bench.spec.write_text(bench.spec.read_text().replace("[tiny_mcq, tiny_yes_no]", "[RefCOCO_val, tiny_yes_no]"))
    assert bench.call("run", "--quiet") == 1
    out = capsys.readouterr().out
    assert (
        f"RefCOCO_val could not be loaded, so nothing of it is answered: ValueError: {table}: 1 rows have no image"
        in out
    )
    assert "5 cells of small have no record yet" in out
    assert [row["status"] for row in read_results(bench.csv)] == ["ok"] * 5


def test_any_exception_of_a_method_is_a_failure_of_its_samples(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class TemplateError(Exception):
        """As chat templates, compilers and plug-ins have: derived from nothing else."""

    answer_all = Session.answer_all

    def failing(self: Session, parts: Any, variants: Any, *more: Any) -> Any:
        if any(v.method == "fastv" for v in variants):
            raise TemplateError("roles must alternate")
        return answer_all(self, parts, variants, *more)

    monkeypatch.setattr(Session, "answer_all", failing)
    assert bench.call("run", "--quiet") == 1
    assert unwhole(bench) == [("fastv", "tiny_mcq", "incomplete"), ("fastv", "tiny_yes_no", "incomplete")]


class Cancelled(BaseException):
    """As event loops and libraries written in Rust raise: no `Exception`, so that nobody takes it for one."""


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("enough"), Cancelled("no more")], ids=repr)
def test_a_method_that_ends_programs_fails_its_samples_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def leave(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(fastv.Method, "score", leave)
    assert bench.call("run", "--quiet") == 1
    assert unwhole(bench) == [("fastv", "tiny_mcq", "incomplete"), ("fastv", "tiny_yes_no", "incomplete")]
    (reason,) = {row["reason"].partition(", e.g.")[0] for row in read_results(bench.csv) if row["status"] != "ok"}
    assert reason == "5 of 5 samples failed (StrayExit 5)"
    record = next(bench.folder.glob("runs/tiny/tiny_mcq/fastv-*/run.json"))
    assert (
        f"raised {type(error).__name__}({error}), which would end the program"
        in json.loads(record.read_text())["reason"]
    )


@pytest.mark.parametrize("error", [SystemExit(0), Cancelled()], ids=repr)
def test_an_evaluator_or_a_reader_that_ends_programs_fails_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    from ivcp_eval.vlmeval_bridge import register

    register()
    from ivcp_eval.vlmeval_bridge import evaluate
    from ivcp_eval.vlmeval_bridge.reading import stock

    def leave(*_: Any, **__: Any) -> Any:
        raise error

    build, read = evaluate.build, stock.build

    def leaving(benchmark: Any, limit: Any) -> Any:
        dataset = build(benchmark, limit)
        dataset.evaluate = leave
        return dataset

    bench.spec.write_text(bench.spec.read_text().replace("limit: 5", "limit: 2"))
    monkeypatch.setattr(evaluate, "build", leaving)
    monkeypatch.setattr(stock, "build", lambda name, *rest: leave() if name == "tiny_yes_no" else read(name, *rest))
    assert bench.call("run", "--quiet") == 1
    assert "tiny_yes_no could not be loaded, so nothing of it is answered" in capsys.readouterr().out
    assert {row[1:] for row in unwhole(bench)} == {("tiny_mcq", "failed")}
    assert "would end the program" in read_results(bench.csv)[0]["reason"]


def test_an_evaluator_that_lacks_a_package_fails_its_cells_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from ivcp_eval.vlmeval_bridge import register

    register()
    from ivcp_eval.vlmeval_bridge import evaluate

    build = evaluate.build

    def lacking(benchmark: Any, limit: Any) -> Any:
        def no_package(*_: Any, **__: Any) -> Any:
            raise ModuleNotFoundError("No module named 'latex2sympy2'")

        dataset = build(benchmark, limit)
        if benchmark.name == "tiny_mcq":
            dataset.evaluate = no_package
        return dataset

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "build", lacking)
        assert bench.call("run", "--quiet") == 1
    assert {(benchmark, status) for _, benchmark, status in unwhole(bench)} == {("tiny_mcq", "failed")}
    assert len(unwhole(bench)) == 5
    assert "latex2sympy2" in read_results(bench.csv)[0]["reason"]
    assert bench.call("run", "--quiet", "--retry-failed") == 0


# -- interruptions ----------------------------------------------------------------------------------------------------


def test_who_goes_on_asks_in_the_company_of_before(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision a row depends on its batch, so a batch that was cut short is answered whole again."""
    small = bench.spec.read_text().replace("  - {method: downsample, ratios: [0.5]}\n", "")
    bench.spec.write_text(small.replace("shard: 3", "shard: 5").replace("batch: 1", "batch: 2") + "dtype: bfloat16\n")
    groups: list[Any] = []
    answer_batch, append = Session.answer_batch, Journal.append

    def counted(self: Session, conversations: Any, *more: Any) -> Any:
        groups.append(conversations)
        return answer_batch(self, conversations, *more)

    monkeypatch.setattr(Session, "answer_batch", counted)
    assert bench.call("run", "--quiet") == 0
    before, groups = groups, []
    assert len(before) == 2 * 2
    cut = bench.elsewhere(bench.folder.parent / "cut")
    kept: list[str] = []

    def killed(self: Journal, key: str, answer: Any) -> None:
        if len(kept) == 5:  # four variants of the first sample, one of the second
            raise KeyboardInterrupt
        kept.append(key)
        append(self, key, answer)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", killed)
        assert cut.call("run", "--quiet") == 130
    assert len(set(kept)) == 2
    assert cut.call("run", "--quiet") == 0
    assert groups == [before[0], *before], "the first batch twice, all of them as they were"
    assert cut.results() == bench.results()


# -- records ----------------------------------------------------------------------------------------------------------


def test_what_a_model_cannot_run_stays_skipped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Session.check

    def refusing(self: Session, variant: Any) -> None:
        if variant.method == "fastv":
            raise Unsupported("not on this model")
        check(self, variant)

    monkeypatch.setattr(Session, "check", refusing)
    assert bench.call("run", "--quiet") == 0
    before = bench.results()
    assert unwhole(bench) == [("fastv", "tiny_mcq", "skipped"), ("fastv", "tiny_yes_no", "skipped")]
    assert bench.call("run", "--quiet", "--retry-failed") == 0
    assert bench.results() == before


def test_removed_answers_are_made_again(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """The marks of answered units lie elsewhere; they count for nothing without the answers."""
    assert bench.call("run", "--quiet") == 0
    before = bench.results()
    shutil.rmtree(next(bench.folder.glob("runs/tiny/tiny_mcq/fastv-*")))
    capsys.readouterr()
    assert bench.call("run") == 0
    assert "2 units and cells are open again" in capsys.readouterr().out
    assert bench.results() == before
    shutil.rmtree(bench.folder / "runs")
    assert bench.call("run", "--quiet") == 0
    assert bench.results() == before


def test_an_incomplete_record_of_another_sweep_is_not_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_all = Session.answer_all

    def failing(self: Session, parts: Any, variants: Any, *more: Any) -> Any:
        if any(v.method == "fastv" for v in variants):
            raise RuntimeError("a kernel gave up")
        return answer_all(self, parts, variants, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "answer_all", failing)
        assert bench.call("run", "--quiet") == 1
    other = dataclasses.replace(bench, spec=bench.spec.with_name("other.yaml"))
    other.spec.write_text(bench.spec.read_text().replace("shard: 3", "shard: 2"))
    assert other.call("run", "--quiet") == 0, "its own units answer what failed, and it is scored anew"
    assert unwhole(other) == []
