"""``ivcp lab gpu``: everything that only a GPU can show, in stages that fit into minutes and resume.

A GPU is often lent for a few minutes at a time. So the work is cut into steps, each a command in a process of its own
with a time limit: what crashes, runs out of memory or out of time leaves a log and costs no other step. Finished steps
are not run again; call the same command until it says that all are done. The raw measurements lie in the output folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import IO

from ivcp_eval.files import CHECKOUT, hold_lock, write_json
from ivcp_eval.interface.registry import family_names
from ivcp_eval.runs.planning.numbers import POSITIVE

IVCP = (sys.executable, "-m", "ivcp_eval")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
#: Of the contract, what holds in half precision too: where a choice may tip over, tokens cannot be compared.
ROBUST = "not beams and not batch_equals and not eager_equals and not uncached and not prompt_lookup"
LEFT_OUT = "left out"
START_S = 25  # no step is begun with less time than this
END_S = 60  # what a step that ends by itself gets for its start and its last writing
#: What the steps of a stage import beside torch, transformers and what these two require: module -> distribution.
NEEDS: Mapping[str, Mapping[str, str]] = {
    "contract": {"pytest": "pytest"},
    "bench": {},
    "fork": {"psutil": "psutil"},
    "throughput": {"scipy": "scipy"},
    "train": {"PIL": "pillow", "torchvision": "torchvision"},
}


@dataclass(frozen=True)
class Profile:
    """How large the stages are.

    Attributes:
        size: of the random model. tokens, batches: prompts of the bench. rounds: of every measurement.
        concurrency, new_tokens: requests of the throughput at a time, and the length of their answers.
        families: of the contract; none: all. contract, oracle: extra ``-k`` expressions. dtypes: in which both run.
        forks: prompts that share a pass. halves: precisions of forks. train: configuration of the training.
    """

    size: str
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    concurrency: tuple[int, ...]
    new_tokens: int
    rounds: int
    families: tuple[str, ...]
    contract: str
    oracle: str
    dtypes: tuple[str, ...]
    forks: tuple[int, ...]
    halves: tuple[str, ...]
    train: str


PROFILES = {
    "full": Profile(
        size="qwen25_7b",
        tokens=(1024, 4096, 16384),
        batches=(1, 8),
        concurrency=(1, 4, 12, 32),
        new_tokens=64,
        rounds=5,
        families=(),
        contract="",
        oracle="",
        dtypes=("float32", "bfloat16", "float16"),
        forks=(1, 8, 32),
        halves=("bfloat16", "float16"),
        train="gpu.yaml",
    ),
    # The same commands on shapes of seconds: proves on any machine that every stage runs.
    "dry": Profile(
        size="tiny",
        tokens=(64,),
        batches=(1,),
        concurrency=(2,),
        new_tokens=2,
        rounds=1,
        families=("llava",),
        contract="ratio_one_is_bit_equal-none",
        oracle="llava and a_s0",
        dtypes=("bfloat16",),
        forks=(2,),
        halves=("float16",),
        train="dry.yaml",
    ),
}


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        stage: which stage it belongs to. name: of its files. command: its arguments. limit_s: seconds after which it
            is stopped.
        until: what its folder holds once it is finished; without it the exit code says so. paced: whether it ends by
            itself when told ``--minutes``.
    """

    stage: str
    name: str
    command: tuple[str, ...]
    limit_s: float
    until: str = ""
    paced: bool = False

    @property
    def missing(self) -> list[str]:
        """Distributions without which it cannot run, and are not here."""
        found = [name for module, name in NEEDS.get(self.stage, {}).items() if find_spec(module) is None]
        return [*found, "the checkout, for its tests,"] if self.stage == "contract" and CHECKOUT is None else found


def steps(profile: Profile, device: str, train_minutes: float, folder: Path) -> Iterator[Step]:
    """All steps: one of each stage in turn, the most telling first, so that a short call learns something of each."""
    stages = (
        _contract(profile, device, folder),
        _bench(profile, device, folder),
        _fork(profile, device, folder),
        _throughput(profile, device, folder),
        _train(profile, train_minutes, folder),
    )
    for turn in itertools.zip_longest(*stages):
        yield from (step for step in turn if step is not None)


def _contract(profile: Profile, device: str, folder: Path) -> Iterator[Step]:
    """Tests of the checkout; those that passed are not run again when their step is."""
    workers = ("-n", "6") if device != "cpu" and find_spec("xdist") else ()
    attentions = ["sdpa"]
    if device != "cpu" and find_spec("flash_attn"):
        attentions.append("flash_attention_2")

    def tests(name: str, dtype: str, attention: str, *chosen: str) -> Step:
        name = f"{name}_{dtype}_{attention}"
        where = ("--device", device, "--dtype", dtype, "--attention", attention)
        outcomes = ("--outcomes", str(folder / f"{name}.jsonl"))
        return Step("contract", name, (*PYTEST, *workers, *chosen, *where, *outcomes), 240)

    def only(*expressions: str) -> tuple[str, ...]:
        kept = [f"({expression})" for expression in expressions if expression]
        return ("-k", " and ".join(kept)) if kept else ()

    for dtype, attention in itertools.product(profile.dtypes, attentions):
        half = dtype != "float32"
        if attention == "flash_attention_2" and not half:  # which it cannot do
            continue
        yield tests("oracle", dtype, attention, "tests/engine/oracle", *only(profile.oracle))
        if not half:
            yield tests("methods", dtype, attention, "tests/methods/test_oracles.py")
            yield tests("waits", dtype, attention, "tests/engine/contract/test_waits.py")
        chosen = ("tests/engine/contract/test_contract.py", *only(profile.contract, ROBUST if half else ""))
        for family in profile.families or family_names():
            yield tests(f"contract_{family}", dtype, attention, *chosen, "--family", family)


def _measured(stage: str, name: str, profile: Profile, device: str, folder: Path, *options: str) -> Step:
    rounds = ("--size", profile.size, "--device", device, "--rounds", f"{profile.rounds}")
    return Step(stage, name, (*IVCP, "bench", *options, *rounds, "--resume", "--out", str(folder / name)), 240)


def _bench(profile: Profile, device: str, folder: Path) -> Iterator[Step]:
    for tokens in profile.tokens:
        prompt = ("pruning", "--tokens", f"{tokens}", "--batch")
        for batch in profile.batches:
            name = f"bench_{tokens}_{batch}"
            yield _measured("bench", name, profile, device, folder, *prompt, f"{batch}", "--methods")
        yield _measured("bench", f"selection_{tokens}", profile, device, folder, *prompt, "1", "--only-methods")


def _fork(profile: Profile, device: str, folder: Path) -> Iterator[Step]:
    for dtype, rows in itertools.product(profile.halves, profile.forks):
        options = ("fork", "--rows", f"{rows}", "--dtype", dtype, "--cell-s", "20")  # it has seven cases
        yield _measured("fork", f"fork_{rows}_{dtype}", profile, device, folder, *options)


def _throughput(profile: Profile, device: str, folder: Path) -> Iterator[Step]:
    for clients in profile.concurrency:
        load = ("throughput", "--concurrency", f"{clients}", "--new-tokens", f"{profile.new_tokens}")
        yield _measured("throughput", f"throughput_{clients}", profile, device, folder, *load)


def _train(profile: Profile, minutes: float, folder: Path) -> Iterator[Step]:
    command = (*IVCP, "lab", "train", "tiny2", "--config", profile.train, "--out", str(folder / "train"))
    yield Step("train", "train", command, 60 * minutes + END_S, until="model", paced=True)


@dataclass(frozen=True)
class Done:
    """What became of a step.

    Attributes:
        step, command: which. code: exit code; None: it did not end, or not run at all. seconds: of the last try.
        note: why it is not finished, in words. tries: how often it was begun.
    """

    step: str
    command: str
    code: int | None
    seconds: float
    note: str = ""
    tries: int = 1

    @property
    def finished(self) -> bool:
        """Whether the step need not run again."""
        return self.code == 0

    @property
    def failed(self) -> bool:
        """Whether it ended, and not well."""
        return self.code not in (0, None)


def run_step(step: Step, folder: Path, seconds: float, tries: int = 1, kept_open: Sequence[int] = ()) -> Done:
    """Run one step for at most ``seconds``; what it prints goes to NAME.log. ``kept_open``: files it inherits."""
    pace = ("--minutes", f"{max(seconds - END_S, START_S) / 60:.2f}") if step.paced else ()
    command = (*step.command, *pace)
    shown = shlex.join(("python" if part == sys.executable else part) for part in command)
    if step.missing:
        return Done(step.name, shown, None, 0.0, f"{LEFT_OUT}: {', '.join(step.missing)} not found here", tries - 1)
    began = time.monotonic()
    with (folder / f"{step.name}.log").open("a", encoding="utf-8") as log, _group(command, log, kept_open) as process:
        try:
            code: int | None = process.wait(seconds)
            note = "" if code == 0 else f"exit code {code}, see {step.name}.log"
            if code == 0 and step.until and not (folder / step.name / step.until).exists():
                code, note = None, "not finished yet"
        except subprocess.TimeoutExpired:
            code, note = None, f"stopped after {seconds:.0f} s"
    return Done(step.name, shown, code, time.monotonic() - began, note, tries)


@contextmanager
def _group(command: Sequence[str], log: IO[str], kept_open: Sequence[int] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, of which nothing is left after the block, whatever ends that.

    SIGKILL alone leaves it running: it then holds on to the files ``kept_open``, and with them to their locks.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # a signal to us does not reach another group

    ends = signal.SIGTERM, signal.SIGHUP  # the second when a terminal or a connection goes
    before = [signal.signal(number, end) for number in ends]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=CHECKOUT,
            process_group=0,
            pass_fds=kept_open,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        for number, handler in zip(ends, before, strict=True):
            signal.signal(number, handler)


def run_all(options: argparse.Namespace) -> int:
    """Every step that is not finished yet, until the time is up: 0 if all are, 75 if some are left, else 1.

    A step has its own limit, or its part of the time that is left where that is longer.

    Raises:
        ValueError: an unknown stage; a folder that holds the results of another profile, device, commit or library; or
            that another call, or what it left running, still works in.
    """
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            hold_lock(lock, folder, wait=False)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is worked in by another call, or by a step whose call was killed; wait for it, end it "
                "(`ps` shows its --out), or choose another --out"
            ) from None
        return _run_all(options, folder, lock.fileno())


def _run_all(options: argparse.Namespace, folder: Path, lock: int) -> int:
    from ivcp_eval.lab.bench.kept import SAME
    from ivcp_eval.lab.bench.report import environment

    end = time.monotonic() + 60 * options.minutes
    made = environment(options.device, "ivcp lab gpu")
    card = (made["gpu"] or {}).get("name", "")
    same = {name: made[name] for name in SAME}
    _same_run(folder, {"profile": options.profile, "device": options.device, "gpu": card, **same})
    every = list(steps(PROFILES[options.profile], options.device, options.train_minutes, folder))
    stages = list(dict.fromkeys(step.stage for step in every))
    if unknown := set(options.stages or ()) - set(stages):
        raise ValueError(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stages)}")
    chosen = [step for step in every if not options.stages or step.stage in options.stages]
    known = {step.name: done for step in chosen if (done := _record(folder, step)) is not None}
    waiting = in_turn(chosen, known)
    for number, step in enumerate(waiting):
        time_left = end - time.monotonic()
        if time_left < START_S:
            break
        part = time_left / (len(waiting) - number)
        tries = known[step.name].tries + 1 if step.name in known else 1
        done = known[step.name] = run_step(step, folder, min(max(step.limit_s, part), time_left), tries, (lock,))
        write_json(folder / f"{step.name}.done.json", asdict(done))
        sys.stdout.write(f"{step.name}: {done.note or 'done'} ({done.seconds:.0f} s)\n")
        sys.stdout.flush()
    finished = sum(done.finished for done in known.values())
    bad = sum(done.failed or done.note.startswith(LEFT_OUT) for done in known.values())
    left = len(chosen) - finished - bad
    sys.stdout.write(f"{finished} of {len(chosen)} steps are finished, {left} left; {bad} failed or left out\n")
    return 75 if left else 1 if bad else 0


def in_turn(chosen: Sequence[Step], known: Mapping[str, Done]) -> list[Step]:
    """What is not finished: steps never tried, then those that were stopped, then failed ones; fewest tries first.

    So nothing that takes all the time, or fails, keeps others from their turn in the next call.
    """

    def rank(step: Step) -> tuple[bool, int]:
        done = known.get(step.name)
        return (False, 0) if done is None else (done.failed, done.tries)

    return sorted((step for step in chosen if step.name not in known or not known[step.name].finished), key=rank)


def _record(folder: Path, step: Step) -> Done | None:
    path = folder / f"{step.name}.done.json"
    return Done(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _same_run(folder: Path, settings: dict[str, str]) -> None:
    path = folder / "run.json"
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise ValueError(f"{folder} holds {before}, this run is {settings}; choose another --out")
    write_json(path, settings)


def parser() -> argparse.ArgumentParser:
    """Arguments of ``ivcp lab gpu``."""
    made = argparse.ArgumentParser(prog="ivcp lab gpu", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--minutes", type=POSITIVE, default=9, help="begin no step, and stop all, after (default: 9)")
    made.add_argument("--stages", nargs="+", metavar="STAGE", help="contract, bench, fork, throughput, train")
    made.add_argument("--out", type=Path, required=True, help="folder of the measurements; the same one goes on")
    made.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    made.add_argument("--profile", choices=sorted(PROFILES), default="full", help="dry: small shapes, for any machine")
    made.add_argument("--train-minutes", type=POSITIVE, default=4, help="of one call of the training (default: 4)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0 all done, 75 call again, 1 a step failed.

    Raises:
        ValueError: CUDA is asked for where torch sees none.
    """
    options = parser().parse_args(arguments)
    if options.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA device here; --device cpu --profile dry tries every stage without one")
    return run_all(options)
