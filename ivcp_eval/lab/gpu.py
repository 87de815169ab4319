"""``ivcp lab gpu``: everything that only a GPU can show, in stages that fit into minutes and resume.

A GPU is often lent for a few minutes at a time. So the work is cut into cells, each a command in a process of its own
with a time limit: what crashes, runs out of memory or out of time leaves a log and costs no other cell. Finished cells
are not run again; call the same command until it says that all are done. The raw measurements lie in the output folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from ivcp_eval.files import CHECKOUT, write_json
from ivcp_eval.runs.planning.numbers import POSITIVE

IVCP = (sys.executable, "-m", "ivcp_eval")
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
#: Of the contract, what holds in half precision too: where a choice may tip over, tokens cannot be compared.
ROBUST = "not beams and not batch_equals and not eager_equals and not uncached and not prompt_lookup"
LEFT_OUT = "left out"
START_S = 25  # no cell is begun with less time than this


@dataclass(frozen=True)
class Profile:
    """How large the stages are.

    Attributes:
        size: of the random model. tokens, batches: prompts of the bench. rounds: of every measurement.
        concurrency, new_tokens: requests of the throughput at a time, and the length of their answers.
        contract: extra ``-k`` expression of the contract. dtypes: in which it runs.
        forks: prompts that share a pass. train: configuration of the training.
    """

    size: str
    tokens: tuple[int, ...]
    batches: tuple[int, ...]
    concurrency: tuple[int, ...]
    new_tokens: int
    rounds: int
    contract: str
    dtypes: tuple[str, ...]
    forks: tuple[int, ...]
    train: str


PROFILES = {
    "full": Profile(
        size="qwen25_7b",
        tokens=(1024, 4096, 16384),
        batches=(1, 8),
        concurrency=(1, 4, 12, 32),
        new_tokens=64,
        rounds=5,
        contract="",
        dtypes=("float32", "bfloat16", "float16"),
        forks=(1, 8, 32),
        train="gpu.yaml",
    ),
    # The same commands on shapes of seconds: proves on any machine that every stage runs.
    "dry": Profile(
        size="tiny",
        tokens=(64,),
        batches=(1,),
        concurrency=(1, 2),
        new_tokens=2,
        rounds=1,
        contract="ratio_one_is_bit_equal-none-llava",
        dtypes=("bfloat16",),
        forks=(2,),
        train="dry.yaml",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One command.

    Attributes:
        stage: which stage it belongs to. name: of its files. command: its arguments; OUT stands for its own file
            without an ending. limit_s: seconds after which it is stopped.
        needs: modules without which it is left out, ``tests`` being the checkout's. until: what its folder holds once
            it is finished; without it the exit code says so.
    """

    stage: str
    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()
    until: str = ""


def cells(profile: Profile, device: str, minutes: float) -> Iterator[Cell]:
    """All cells, the most telling first."""
    where = ("--device", device)
    attentions = ["sdpa"]
    if device != "cpu" and find_spec("flash_attn"):
        attentions.append("flash_attention_2")
    for dtype in profile.dtypes:
        for attention in attentions if dtype != "float32" else ["sdpa"]:
            parts = (profile.contract, "" if dtype == "float32" else ROBUST)
            chosen = " and ".join(f"({part})" for part in parts if part)
            files = ["tests/engine/contract/test_contract.py"]
            if dtype == "float32":
                files += ["tests/engine/oracle", "tests/methods/test_oracles.py", "tests/engine/contract/test_waits.py"]
            options = (*where, "--dtype", dtype, "--attention", attention, "--junitxml", "OUT.xml")
            command = (*PYTEST, *files, *options, *(("-k", chosen) if chosen else ()))
            yield Cell("contract", f"contract_{dtype}_{attention}", command, 540, ("pytest", "tests"))
    rounds = ("--rounds", f"{profile.rounds}", "--out", "OUT")

    def bench(stage: str, name: str, limit_s: float, *options: str) -> Cell:
        return Cell(stage, name, (*IVCP, "bench", *options, "--size", profile.size, *where, *rounds), limit_s)

    for tokens, batch in itertools.product(profile.tokens, profile.batches):
        prompt = ("--tokens", f"{tokens}", "--batch", f"{batch}")
        yield bench("bench", f"bench_{tokens}_{batch}", 240, "pruning", *prompt, "--methods")
    for tokens in profile.tokens:
        prompt = ("--tokens", f"{tokens}", "--batch", "1")
        yield bench("bench", f"selection_{tokens}", 300, "pruning", *prompt, "--only-methods")
    dtype = "float32" if device == "cpu" else "bfloat16"
    for rows in profile.forks:
        yield bench("fork", f"fork_{rows}", 240, "fork", "--rows", f"{rows}", "--dtype", dtype)
    for clients in profile.concurrency:
        load = ("--concurrency", f"{clients}", "--new-tokens", f"{profile.new_tokens}")
        yield bench("throughput", f"throughput_{clients}", 240, "throughput", *load)
    train = ("lab", "train", "tiny2", "--config", profile.train, "--minutes", f"{minutes:g}", "--out", "OUT")
    yield Cell("train", "train", (*IVCP, *train), 60 * minutes + 60, until="model")


@dataclass(frozen=True)
class Done:
    """What became of a cell: exit code (None: it did not end, or not run at all), seconds, and why in words."""

    cell: str
    command: str
    code: int | None
    seconds: float
    note: str = ""

    @property
    def finished(self) -> bool:
        """Whether the cell need not run again."""
        return self.code == 0


def run_cell(cell: Cell, folder: Path, seconds: float) -> Done:
    """Run one cell for at most ``seconds``; what it prints goes to NAME.log."""
    command = tuple(part.replace("OUT", str(folder / cell.name)) if "OUT" in part else part for part in cell.command)
    shown = " ".join(part.replace(sys.executable, "python") for part in cell.command)
    if missing := [name for name in cell.needs if not _there(name)]:
        return Done(cell.name, shown, None, 0.0, f"{LEFT_OUT}: {' and '.join(missing)} not found here")
    began = time.monotonic()
    with (folder / f"{cell.name}.log").open("a", encoding="utf-8") as log:
        try:
            code: int | None = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=CHECKOUT, timeout=seconds, check=False
            ).returncode
            note = "" if code == 0 else f"exit code {code}, see {cell.name}.log"
            if code == 0 and cell.until and not (folder / cell.name / cell.until).exists():
                code, note = None, "not finished yet"
        except subprocess.TimeoutExpired:
            code, note = None, f"stopped after {seconds:.0f} s"
    return Done(cell.name, shown, code, time.monotonic() - began, note)


def _there(module: str) -> bool:
    return CHECKOUT is not None if module == "tests" else find_spec(module) is not None


def run_all(options: argparse.Namespace) -> int:
    """Every cell that is not finished yet, until the time is up: 0 if all are, 1 if a cell failed, 75 if some are left.

    Raises:
        ValueError: an unknown stage; or a folder that holds the results of another profile or device.
    """
    folder, end = options.out.resolve(), time.monotonic() + 60 * options.minutes
    folder.mkdir(parents=True, exist_ok=True)
    _same_run(folder, {"profile": options.profile, "device": options.device})
    every = list(cells(PROFILES[options.profile], options.device, options.train_minutes))
    stages = list(dict.fromkeys(cell.stage for cell in every))
    if unknown := set(options.stages or ()) - set(stages):
        raise ValueError(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(stages)}")
    chosen = [cell for cell in every if not options.stages or cell.stage in options.stages]
    failed = left = 0
    for cell in chosen:
        record = folder / f"{cell.name}.done.json"
        if record.exists() and Done(**json.loads(record.read_text(encoding="utf-8"))).finished:
            continue
        time_left = end - time.monotonic()
        if time_left < START_S:
            left += 1
            continue
        done = run_cell(cell, folder, min(cell.limit_s, time_left))
        write_json(record, asdict(done))
        failed += done.code not in (0, None)
        left += done.code is None and not done.note.startswith(LEFT_OUT)
        sys.stdout.write(f"{cell.name}: {done.note or 'done'} ({done.seconds:.0f} s)\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - failed - left} of {len(chosen)} cells need no other run; {failed} failed\n")
    return 1 if failed else 75 if left else 0


def _same_run(folder: Path, settings: dict[str, str]) -> None:
    path = folder / "run.json"
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        raise ValueError(f"{folder} holds {before}, this run is {settings}; choose another --out")
    write_json(path, settings)


def parser() -> argparse.ArgumentParser:
    """Arguments of ``ivcp lab gpu``."""
    made = argparse.ArgumentParser(prog="ivcp lab gpu", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--minutes", type=POSITIVE, default=9, help="begin no cell, and stop all, after (default: 9)")
    made.add_argument("--stages", nargs="+", metavar="STAGE", help="contract, bench, fork, throughput, train")
    made.add_argument("--out", type=Path, required=True, help="folder of the measurements; the same one goes on")
    made.add_argument("--device", default="cuda", help="cuda or cpu (default: cuda)")
    made.add_argument("--profile", choices=sorted(PROFILES), default="full", help="dry: small shapes, for any machine")
    made.add_argument("--train-minutes", type=POSITIVE, default=8, help="of one call of the training (default: 8)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; 0 all done, 75 call again, 1 a cell failed.

    Raises:
        ValueError: CUDA is asked for where torch sees none.
    """
    options = parser().parse_args(arguments)
    if options.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("torch sees no CUDA device here; --device cpu --profile dry tries every stage without one")
    return run_all(options)
