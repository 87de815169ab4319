"""The time limit of an answer: what it interrupts, what is kept of it, and how it is retried. The clock is a fake."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from ivcp_eval.engine.fork import fork
from ivcp_eval.engine.fork.trunk import Branch
from ivcp_eval.interface import failures, models
from ivcp_eval.interface.failures import AnswerTimeout, deadline, steps
from ivcp_eval.interface.variants import Variant
from ivcp_eval.reports.table import read_results
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement
from ivcp_eval.runs.store.journal import Journal
from tests.engine import tiny_models
from tests.runs.conftest import Bench, Lab

VARIANTS = (Variant("tiny"), Variant("tiny", "fastv", 0.5), Variant("tiny", "ivc_prune", 0.5))


class Clock:
    """Seconds that pass when told, and ``tick`` of them whenever somebody looks."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick, self.looks = 0.0, tick, 0

    def monotonic(self) -> float:
        self.now += self.tick
        self.looks += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(failures, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", tiny_models.names())
def test_every_block_of_every_family_looks_at_the_clock(family: str) -> None:
    model, _ = tiny_models.build(family)
    found = list(steps(model))
    assert set(tiny_models.text_model(family, model).layers) <= set(found)
    inner = {id(child) for block in found for child in block.modules() if child is not block}
    assert not any(id(block) in inner for block in found), "a block inside a block would look twice"


def test_every_moment_can_be_interrupted_and_leaves_nothing_behind(clock: Clock) -> None:
    """One tick per look: each number of seconds ends the run before another block of vision, prefill or decoding."""
    model, make_inputs = tiny_models.build("qwen2_5_vl")
    inputs, blocks = make_inputs("t5 i0 t9"), list(steps(model))
    clock.tick = 1.0

    def run(seconds: float) -> list[list[int]]:
        with deadline(blocks, seconds), torch.inference_mode():
            return [a.tokens[0].tolist() for a in fork(model, VARIANTS, inputs, max_new_tokens=4)]

    before = hooks(model)
    wanted = run(1e9)
    total = clock.looks
    assert total > len(blocks) + 3 * 6, "vision, the prefill, and three decoding steps of six layers"
    for seconds in range(1, total - 2, 5):
        with pytest.raises(AnswerTimeout, match="--timeout"):
            run(seconds)
        assert hooks(model) == before
    assert run(total) == wanted


def test_a_session_counts_what_is_made_together(
    random_model: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(models.locate("tiny", str(random_model)), Placement("cpu").resolve(), Limits(784, 100352, 4))
    parts = [{"image": Image.new("RGB", (84, 84), "red")}, {"text": "What colour?"}]
    wanted = session.answer_all(parts, VARIANTS)
    encoded = Session._encoded

    def slow(self: Session, *conversations: Any) -> Any:
        clock.now += 25
        return encoded(self, *conversations)

    monkeypatch.setattr(Session, "_encoded", slow)
    session.timeout = 10
    assert session.answer_all(parts, VARIANTS) == wanted, "25 s for three answers of 10 s each"
    assert [r[0] for r in session.answer_batch([parts, parts], VARIANTS[:2])] == [wanted[0]] * 2
    for few in (VARIANTS[:1], VARIANTS[:2]):
        with pytest.raises(AnswerTimeout, match=r"within [12]0 s"):
            session.answer_all(parts, few)
    with pytest.raises(AnswerTimeout, match="within 10 s"):
        session.answer(parts, VARIANTS[1])
    session.timeout = 30
    assert session.answer(parts, VARIANTS[1]) == wanted[1]


@pytest.fixture
def slow_fastv(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Let FastV take some time in the n-th sample that is answered together (n from 1), and where it is retried."""
    state = {"n": 0}
    late: dict[int, float] = {}
    answer_all, prefill = Session.answer_all, Branch.prefill

    def counted(self: Session, parts: Any, variants: Any, *more: Any) -> Any:
        state["n"] += len(variants) > 1
        if len(variants) == 1 and variants[0].method == "fastv":
            # Alone, no `Branch` runs: the time passes while the sample is encoded.
            encoded = self._encoded
            with monkeypatch.context() as patch:
                patch.setattr(self, "_encoded", lambda *c: (wait(), encoded(*c))[1], raising=False)
                return answer_all(self, parts, variants, *more)
        return answer_all(self, parts, variants, *more)

    def wait() -> None:
        clock.now += late.get(state["n"], 0)

    def slow(self: Branch, *arguments: Any) -> Any:
        if self.run.method == "fastv":
            wait()
        return prefill(self, *arguments)

    monkeypatch.setattr(Session, "answer_all", counted)
    monkeypatch.setattr(Branch, "prefill", slow)
    return late.update


def test_a_late_answer_is_an_error_of_its_variant_and_retried_with_more_time(
    bench: Bench, slow_fastv: Callable[[dict[int, float]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    clean = bench.elsewhere(bench.folder.parent / "clean")
    assert clean.call("run", "--quiet") == 0
    hashes = {path.name for path in clean.folder.glob("runs/*/*/*")}
    slow_fastv({12: 100, 14: 30})
    bench.spec.write_text(bench.spec.read_text() + "timeout: 10\n")
    assert bench.call("run", "--quiet") == 1  # samples 11 to 20: the second and the fourth of tiny_mcq are slow
    bad = [row for row in read_results(bench.csv) if row["status"] != "ok"]
    assert [(row["method"], row["status"], row["n_failed"]) for row in bad] == [("fastv", "incomplete", 1)]
    assert "1 of 5 samples failed (AnswerTimeout 1)" in bad[0]["reason"], "30 s were within the 40 s of four variants"
    assert "no answer within 10 s" in bad[0]["reason"]
    assert {path.name for path in bench.folder.glob("runs/*/*/*")} == hashes, (
        "the limit is no part of a cell's identity"
    )
    (cell,) = bench.folder.glob("runs/tiny/tiny_mcq/fastv-*")
    (error,) = [record for record in Journal(cell / "journal.jsonl").load().values() if record.error]
    assert error.prediction == "", "nothing of a cut answer is kept"
    assert "in check" in error.traceback
    assert json.loads((cell / "run.json").read_text())["timeout_s"] == 10
    table = next(bench.csv.with_suffix("").glob("*.md")).read_text()
    row = next(line for line in table.splitlines() if "fastv" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:] == ["-", "-", "-", "0.0", "-"], "no cost, no score where it failed, no average"

    capsys.readouterr()
    assert bench.call("status") == 1
    assert "AnswerTimeout 1" in capsys.readouterr().out
    assert bench.call("plan") == 0
    assert "time limit of an answer: 10 s" in capsys.readouterr().out
    assert bench.call("run", "--quiet", "--timeout", "500") == 1, "without --retry-failed it stays as it is"
    slow_fastv({20: 100})  # 20 were answered together; what is retried is one variant alone
    assert bench.call("run", "--quiet", "--retry-failed") == 1, "still too late"
    assert bench.call("run", "--quiet", "--retry-failed", "--timeout", "500") == 0
    assert bench.results() == clean.results(), "an answer that came in time is the same answer"


def test_eval_retries_a_late_answer_in_its_next_run(random_model: Path, bench: Bench, clock: Clock) -> None:
    lab = Lab(random_model, bench.folder)
    single = ("--data", "tiny_mcq", "--limit", "3", "--ratio", "0.5")
    clock.tick = 1.0
    assert lab.eval(*single, "--timeout", "5") == 1
    assert {row["status"] for row in lab.rows()} <= {"incomplete", "failed"}
    assert all("3 of 3 samples failed (AnswerTimeout 3)" in row["reason"] for row in lab.rows())
    ids = {row["run_id"] for row in lab.rows()}
    assert lab.eval(*single, "--timeout", "1e6") == 0
    assert {row["run_id"] for row in lab.rows()} == ids


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_bad_limits_are_refused(
    value: str, random_model: Path, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    for refused in (Lab(random_model, bench.folder).eval, partial(bench.call, "run")):
        with pytest.raises(SystemExit) as caught:
            refused("--timeout", value)
        assert caught.value.code == 2
        assert "--timeout: must be a finite number above 0" in capsys.readouterr().err
    bench.spec.write_text(bench.spec.read_text() + f"timeout: {'.' * (value in ('nan', 'inf')) + value}\n")
    assert bench.call("plan") == 2
    assert "timeout must be a finite number above 0" in capsys.readouterr().err
