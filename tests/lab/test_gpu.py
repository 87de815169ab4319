"""`ivcp lab gpu`: steps that end in time and resume, and every stage for real on small shapes."""

from __future__ import annotations

import csv
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ivcp_eval.files import CHECKOUT, hold_lock
from ivcp_eval.lab import gpu

QUICK = "import sys; open(sys.argv[1] + '.ran', 'a').write('x')"
BROKEN, SLOW = "raise SystemExit(3)", "import time; time.sleep(60)"


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[gpu.Step]:
    """What `ivcp lab gpu` takes for all of its steps."""
    every: list[gpu.Step] = []
    monkeypatch.setattr(gpu, "steps", lambda *_: iter(every))
    return every


def _step(out: Path, name: str, code: str, stage: str = "try", **options: Any) -> gpu.Step:
    return gpu.Step(stage, name, (sys.executable, "-c", code, str(out / name)), 30, **options)


def _run(out: Path, *more: str) -> int:
    return gpu.main(["--device", "cpu", "--profile", "dry", "--out", str(out), *more])


def _done(out: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((out / f"{name}.done.json").read_text()))


def test_cells_fail_alone_and_finished_ones_rest(
    tmp_path: Path, given: list[gpu.Step], capsys: pytest.CaptureFixture[str]
) -> None:
    given += [_step(tmp_path, "fine", QUICK), _step(tmp_path, "broken", BROKEN), _step(tmp_path, "after", QUICK)]
    assert _run(tmp_path) == 1
    shown = capsys.readouterr().out
    assert "broken: exit code 3, see broken.log" in shown
    assert "2 of 3 steps are finished, 0 left; 1 failed or left out" in shown
    given[1] = _step(tmp_path, "broken", QUICK)
    assert _run(tmp_path) == 0
    assert [(tmp_path / f"{name}.ran").read_text() for name in ("fine", "broken", "after")] == ["x", "x", "x"]
    done = _done(tmp_path, "after")
    assert (done["code"], done["step"], done["tries"], _done(tmp_path, "broken")["tries"]) == (0, "after", 1, 2)
    assert done["command"].startswith("python -c ")


def test_what_is_not_installed_is_said_and_is_not_success(
    tmp_path: Path, given: list[gpu.Step], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "NEEDS", {"poor": {"json": "json", "no_such_module": "its-distribution"}})
    given += [_step(tmp_path, "absent", QUICK, "poor"), _step(tmp_path, "fine", QUICK)]
    assert _run(tmp_path) == 1
    assert "absent: left out: its-distribution not found here" in capsys.readouterr().out
    assert not (tmp_path / "absent.ran").exists()
    assert (tmp_path / "fine.ran").exists()


def test_time_is_kept_and_what_is_left_runs_in_the_next_call(
    tmp_path: Path, given: list[gpu.Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "START_S", 0.5)
    given += [_step(tmp_path, "slow", SLOW), _step(tmp_path, "never", QUICK)]
    assert _run(tmp_path, "--minutes", "0.02") == 75
    assert "stopped after" in _done(tmp_path, "slow")["note"]
    assert not (tmp_path / "never.ran").exists()
    given[0] = _step(tmp_path, "slow", QUICK)
    assert _run(tmp_path) == 0
    assert (tmp_path / "never.ran").exists()


def test_no_cell_keeps_another_from_its_turn(
    tmp_path: Path, given: list[gpu.Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes all the time of a call, or fails, is not the first of the next call; and calls go on to be asked
    for while any step waits for its turn, whatever failed."""
    monkeypatch.setattr(gpu, "START_S", 0.5)
    given += [_step(tmp_path, "broken", BROKEN), _step(tmp_path, "slow", SLOW), _step(tmp_path, "other", SLOW)]
    given += [_step(tmp_path, "last", QUICK)]
    assert _run(tmp_path, "--minutes", "0.02") == 75
    assert not (tmp_path / "other.done.json").exists()
    assert _run(tmp_path, "--minutes", "0.02") == 75
    known = {name: gpu.Done(**_done(tmp_path, name)) for name in ("broken", "slow", "other")}
    assert {name: done.tries for name, done in known.items()} == {"broken": 1, "slow": 1, "other": 1}
    assert [step.name for step in gpu.in_turn(given, known)] == ["last", "slow", "other", "broken"]
    known["slow"] = replace(known["slow"], tries=2)
    assert [step.name for step in gpu.in_turn(given, known)] == ["last", "other", "slow", "broken"]


def test_what_is_left_of_the_time_is_shared_by_the_cells_that_are_left(
    tmp_path: Path, given: list[gpu.Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's limit gives others their turn; where there are few, a step has more."""
    seconds = list[float]()

    def run_step(step: gpu.Step, folder: Path, limit: float, tries: int, kept_open: Sequence[int]) -> gpu.Done:
        seconds.append(limit)
        return gpu.Done(step.name, "", None, limit, f"stopped after {limit:.0f} s", tries)

    monkeypatch.setattr(gpu, "run_step", run_step)
    given += [_step(tmp_path, name, SLOW) for name in ("one", "other")]
    assert _run(tmp_path, "--minutes", "3") == 75
    assert seconds == pytest.approx([90, 180], abs=5)
    seconds.clear()
    given[:] = [_step(tmp_path, f"{number}", SLOW) for number in range(60)]
    assert _run(tmp_path, "--minutes", "3") == 75
    assert seconds[0] == 30, "its own limit, where its part is shorter"


def test_a_call_learns_something_of_every_stage(tmp_path: Path) -> None:
    every = list(gpu.steps(gpu.PROFILES["full"], "cuda", 4, tmp_path))
    stages = [step.stage for step in every]
    assert len(set(stages[:5])) == len(set(stages)) == 5
    assert {step.name for step in every if "qwen3_vl" in step.name} == {
        f"contract_qwen3_vl_{dtype}_sdpa" for dtype in ("float32", "bfloat16", "float16")
    }
    assert all(step.limit_s <= 300 for step in every), "two steps or more in a call of nine minutes"


CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open(sys.argv[1] + ".pid", "w").write(str(child.pid))
time.sleep({})
"""


def _gone(pid: int) -> bool:
    """Whether a process has ended; what nobody has waited for yet may still have a number."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("seconds", [0, 60])
def test_nothing_of_a_step_outlives_it(seconds: int, tmp_path: Path) -> None:
    """Neither of one that ended, nor of one that was stopped."""
    done = gpu.run_step(_step(tmp_path, "parent", CHILD.format(seconds)), tmp_path, 3)
    assert done.code == (None if seconds else 0)
    assert _gone(int((tmp_path / "parent.pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_of_a_step_outlives_the_command(number: signal.Signals, tmp_path: Path) -> None:
    """A limit around the whole command ends its steps too, which are not in its process group."""
    code = (
        "import sys; from pathlib import Path; from ivcp_eval.lab import gpu; out = Path(sys.argv[1])\n"
        f"gpu.run_step(gpu.Step('try', 'parent', (sys.executable, '-c', {CHILD.format(60)!r}, str(out / 'parent')), 60)"
        ", out, 60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) as command:
        pid = tmp_path / "parent.pid"
        while not (pid.exists() and pid.read_text()):
            assert command.poll() is None
            time.sleep(0.05)
        command.send_signal(number)
        assert command.wait(20) == 128 + number
    assert _gone(int(pid.read_text()))


def test_an_argument_may_hold_any_letters(tmp_path: Path) -> None:
    """Nothing in a command is replaced: not in a folder of that name either."""
    out = tmp_path / "OUT"
    (step, *_) = [step for step in gpu.steps(gpu.PROFILES["dry"], "cpu", 1, out) if step.stage == "bench"]
    assert step.command[-1] == str(out / step.name)
    out.mkdir()
    assert gpu.run_step(gpu.Step("try", "OUT", (*PRINT, "OUTPUT"), 30), out, 30).finished
    assert (out / "OUT.log").read_text() == "OUTPUT\n"


PRINT = (sys.executable, "-c", "import sys; print(*sys.argv[1:])")


def test_a_cell_that_goes_on_is_finished_by_what_it_leaves(tmp_path: Path, given: list[gpu.Step]) -> None:
    half = "import sys, pathlib; f = pathlib.Path(sys.argv[1]); f.mkdir(exist_ok=True)"
    given += [_step(tmp_path, "train", half, until="model")]
    assert _run(tmp_path) == 75
    given[0] = _step(tmp_path, "train", half + "; (f / 'model').mkdir()", until="model")
    assert _run(tmp_path) == 0


def test_a_cell_that_ends_by_itself_is_told_its_time(tmp_path: Path) -> None:
    """So that it has saved what it did when the time is up."""
    gpu.run_step(gpu.Step("try", "paced", PRINT, 30, paced=True), tmp_path, gpu.END_S + 90)
    assert (tmp_path / "paced.log").read_text() == "--minutes 1.50\n"


def test_other_settings_need_another_folder(tmp_path: Path, given: list[gpu.Step]) -> None:
    given += [_step(tmp_path, "fine", QUICK)]
    assert _run(tmp_path) == 0
    with pytest.raises(ValueError, match="choose another --out"):
        gpu.main(["--device", "cpu", "--profile", "full", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match="no stage polish; there are try"):
        _run(tmp_path, "--stages", "polish")


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--device cpu --profile dry"):
        gpu.main(["--out", str(tmp_path)])


BARE = """
import sys
from importlib.machinery import PathFinder
from packaging.utils import canonicalize_name

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {modules!r} else super().find_spec(name, path, target)

    @staticmethod
    def find_distributions(*args, **options):
        found = PathFinder.find_distributions(*args, **options)
        return (one for one in found if canonicalize_name(one.name) not in {distributions!r})

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""


def _with_requirements(names: Iterable[str]) -> set[str]:
    """Installed distributions, and what they require."""
    found, todo = set[str](), list(names)
    while todo:
        if (name := canonicalize_name(todo.pop())) not in found:
            found.add(name)
            required = map(Requirement, (metadata.requires(name) or []) if name in _installed() else [])
            todo += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@functools.cache
def _installed() -> set[str]:
    return {canonicalize_name(one.name) for one in metadata.distributions()}


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes from steps what is not on a machine with torch, transformers and what docs/gpu.md says to carry."""

    def take(stage: str) -> None:
        there = _with_requirements(("torch", "transformers", "pip", *gpu.NEEDS[stage].values())) | {"ivcp-eval"}
        owners = metadata.packages_distributions().items()
        modules = {name for name, owned in owners if not {canonicalize_name(one) for one in owned} & there}
        folder = tmp_path / "site"
        folder.mkdir()
        text = BARE.format(modules=sorted(modules), distributions=sorted(_installed() - there))
        (folder / "sitecustomize.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{CHECKOUT}")

    return take


@pytest.mark.parametrize("stage", sorted(gpu.NEEDS))
def test_every_stage_runs_on_small_shapes(stage: str, tmp_path: Path, bare: Callable[[str], None]) -> None:
    """As on a machine that has nothing but what the stage says that it needs."""
    bare(stage)
    assert _run(tmp_path, "--stages", stage) == 0
    steps = [step for step in gpu.steps(gpu.PROFILES["dry"], "cpu", 8, tmp_path) if step.stage == stage]
    assert steps
    for step in steps:
        done = _done(tmp_path, step.name)
        assert (done["code"], done["note"]) == (0, ""), (tmp_path / f"{step.name}.log").read_text()[-2000:]
    if stage == "throughput":
        rows = list(csv.DictReader((tmp_path / "throughput_2.csv").open()))
        assert [(row["method"], float(row["ratio"])) for row in rows] == [
            ("none", 1),
            ("ivc_prune", 0.5),
            ("ivc_prune", 0.25),
        ]
        assert all(float(row["requests_per_s"]) > 0 and int(row["batch"]) == 2 for row in rows)
        assert float(rows[0]["end_to_end_ratio"]) == 1
        assert float(rows[1]["kv_bytes"]) < float(rows[0]["kv_bytes"])
    if stage == "contract":
        for name in ("oracle_bfloat16_sdpa", "contract_llava_bfloat16_sdpa"):
            lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines() if line]
            assert {line["outcome"] for line in lines} == {"passed"}
    if stage == "fork":
        rows = json.loads((tmp_path / "fork_2_float16.json").read_text())["rows"]
        assert all(row["equal"] <= row["variants"] for row in rows)


def test_the_docs_say_what_to_carry() -> None:
    """All of it: what the stages need, and what that requires, beside torch's and transformers' own requirements."""
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    carried = set(text.partition("pip download --no-deps -d wheels")[2].partition("`")[0].split())
    needed = _with_requirements(name for needs in gpu.NEEDS.values() for name in needs.values())
    assert needed - _with_requirements(("torch", "transformers")) <= {name.partition("==")[0] for name in carried}


def test_the_full_profile_asks_for_what_the_bench_knows(tmp_path: Path) -> None:
    """Every command of the full profile is understood by its own parser."""
    from ivcp_eval.lab.bench import fork, pruning, throughput
    from ivcp_eval.lab.tiny2.training.train import CONFIGS

    parsers = {"pruning": pruning.parser(), "fork": fork.parser(), "throughput": throughput.parser()}
    steps = list(gpu.steps(gpu.PROFILES["full"], "cuda", 8, tmp_path))
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        arguments = list(step.command[3:])
        if step.stage in ("bench", "fork", "throughput"):
            assert arguments[0] == "bench"
            parsers[arguments[1]].parse_args(arguments[2:])
        elif step.stage == "train":
            assert (CONFIGS / "gpu.yaml").exists()


def test_two_calls_do_not_share_a_folder_nor_two_versions(
    tmp_path: Path, given: list[gpu.Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step whose call was killed holds the folder too; and what another commit or card measured is another run."""
    given += [_step(tmp_path, "slow", SLOW)]
    with (tmp_path / ".lock").open("a") as lock:
        hold_lock(lock, tmp_path)
        with subprocess.Popen(["sleep", "60"], pass_fds=(lock.fileno(),)) as outlived:
            lock.close()
            with pytest.raises(ValueError, match="another call, or by a step whose call was killed"):
                _run(tmp_path)
            outlived.kill()
    given[0] = _step(tmp_path, "slow", QUICK)
    assert _run(tmp_path) == 0
    known = json.loads((tmp_path / "run.json").read_text())
    assert known["transformers"] == metadata.version("transformers")
    (tmp_path / "run.json").write_text(json.dumps({**known, "commit": "an earlier one"}))
    with pytest.raises(ValueError, match="choose another --out"):
        _run(tmp_path)
