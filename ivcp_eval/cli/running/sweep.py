"""Plan and run many variants on many benchmarks, resumable."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ivcp_eval.files import DamagedError
from ivcp_eval.runs.planning.finished import eval_state
from ivcp_eval.runs.planning.numbers import AMOUNT, COUNT, INDEX
from ivcp_eval.runs.planning.options import add_flags, given_flags
from ivcp_eval.runs.planning.spec import load

if TYPE_CHECKING:
    from ivcp_eval.runs.planning.plan import RunPlan
    from ivcp_eval.runs.progress.display import Progress

from ivcp_eval.cli import add_common, notices, say

IDLE_S = 15.0  # without anybody at work, after which there is nothing to follow; a worker starts in less
FLAGS = ("device", "exact", "timeout", "timing", "batch")  # the file's own are said there; these may differ by run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ivcp sweep``."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    texts = {
        "plan": "print the cells, what is done, and what the rest will cost",
        "run": "run what is not done, here or on a cluster; run again to continue",
        "work": "be one worker of a sweep (what an sbatch script calls)",
        "status": "print what is done, running, failed, and how long it will take",
        "results": "write the CSV and the tables from the records",
    }
    for name, text in texts.items():
        verb = verbs.add_parser(name, help=text, description=text)
        if name == "results":
            verb.add_argument(
                "sweep", nargs="*", help="sweep files or names (default: all that ever ran, and evaluations)"
            )
        else:
            verb.add_argument("sweep", type=Path, help="sweep file, e.g. sweeps/smoke.yaml")
        verb.add_argument("--runs", type=Path, help="where records live (default: results/runs)")
        if name != "results":
            add_flags(verb, FLAGS, default="the file's")
        add_common(verb)
        if name in ("run", "work", "status"):
            verb.add_argument("--every", type=AMOUNT, default=30.0, metavar="SECONDS",
                help="between two reports where the output is no terminal; 0: none (default: %(default)g)")  # fmt: skip
            verb.add_argument("--html", type=_page, metavar="FILE", help="also keep a page that shows every cell and "
                "reads itself anew in a browser; all workers write it, at most every ten seconds")  # fmt: skip
        if name == "status":
            live = verb.add_mutually_exclusive_group()
            live.add_argument(
                "--follow", action="store_true", help="show progress until everything is done or nobody works on it"
            )
            live.add_argument(
                "--watch", action="store_true", help="as --follow, but every cell, redrawn in place; into a file or "
                "pipe the end alone",
            )  # fmt: skip
        if name == "work":
            verb.add_argument("--model", default="", help="only this model")
            verb.add_argument("--no-score", action="store_true", help="only answer; another worker scores")
            verb.add_argument("--no-answer", action="store_true", help="only score; needs no GPU")
            verb.add_argument("--not-alone", action="store_true", help="others work on the same device: time nothing")
        if name == "run":
            _add_run(verb)


def _add_run(verb: argparse.ArgumentParser) -> None:
    add = verb.add_argument
    add("--executor", choices=("local", "slurm"), default="local")
    add("--workers", type=INDEX, default=0, help="local processes (default: one per GPU, or one)")
    add("--retry-failed", action="store_true", help="try again what failed")
    add("--partition", default="", help="Slurm partition")
    add("--gpus-per-task", type=INDEX, default=1, help="GPUs of a Slurm task (default: %(default)s)")
    add("--cpus-per-task", type=COUNT, default=4, help="CPUs of a Slurm task (default: %(default)s)")
    add("--array-limit", type=COUNT, default=8, help="most Slurm tasks (default: %(default)s)")
    add("--minutes", type=COUNT, default=24 * 60, help="time limit of a Slurm task, which is requeued while work "
        "is left (default: %(default)s)")  # fmt: skip
    add("--wait", action="store_true", help="stay and show the progress of the Slurm tasks, then print the results")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="further sbatch options, e.g. account=abc")


def _page(text: str) -> Path:
    path = Path(text).expanduser().resolve()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise argparse.ArgumentTypeError(f"{text} {what}; name a file, e.g. status.html")
    return path


def run(args: argparse.Namespace) -> int:
    """Run one verb; 0 done, 1 something is not whole, 75 asked to stop or the GPU was lost (76 from `work`)."""
    if args.verb == "results":
        return _results(args)
    spec = load(args.sweep).with_options(given_flags(args, FLAGS))
    from ivcp_eval.runs.planning.plan import make, write_manifest
    from ivcp_eval.runs.records.state import reopen

    device = args.device or spec.options.device
    slurm = args.verb == "run" and args.executor == "slurm"
    if slurm and not device:
        device = "cuda" if args.gpus_per_task else "cpu"
    plan_only = slurm or args.verb in ("plan", "status") or (args.verb == "work" and args.no_answer)
    fetch = notices(args) if args.verb == "run" and not slurm else None
    plan = make(spec, args.runs, device, plan_only=plan_only, fetch=fetch)
    if args.verb == "plan":
        return _plan(plan)
    if args.verb == "status":
        if (args.follow or args.watch) and not args.quiet:
            _follow(plan, args)
        return _status(plan, args.html)
    if not plan.models:
        raise ValueError("nothing of this sweep can run here:\n" + "\n".join(plan.problems))
    for problem in plan.problems:
        say(f"NOT PART OF THIS RUN: {problem}")
    for line in [*plan.notices, *plan.misfits]:
        notices(args)(line)
    if args.verb == "run":
        write_manifest(plan)
    retry = args.verb == "run" and args.retry_failed
    if (opened := reopen(plan, retry, say)) or retry:
        notices(args)(f"{opened} units and cells are open again: {'failed or ' * retry}removed or damaged since")
    if args.verb == "work":
        return _work(plan, args)
    return _run(plan, args, device)


def _plan(plan: RunPlan) -> int:
    from ivcp_eval.runs.progress import status
    from ivcp_eval.runs.progress.watch import Watch

    tallies = list(Watch(plan).tallies.values())
    n_cells, here = len(plan.spec.cells), sum(line.cells for line in tallies)
    say(status.table(tallies))
    for text in [*status.uncounted(plan), *plan.budgets(), *plan.misfits]:
        say(text)
    for problem in plan.problems:
        say(f"\nnot here: {problem}")
    cost = status.cost(plan)
    limit = plan.options.timeout
    say(f"\ntime limit of an answer: {'none but its length' if limit is None else f'{limit:g} s'}")
    dollars = "price unknown" if cost.judge_dollars is None else f"about ${cost.judge_dollars:.2f}"
    say(
        f"{n_cells} cells, {here} of them possible here, "
        f"{sum(line.scored - line.broken for line in tallies)} finished\n"
        f"GPU hours (rough; constants in ivcp_eval/runs/progress/status.py): {cost.gpu_hours:.1f}\n"
        f"judge calls: {cost.judge_calls:,} ({dollars}), "
        f"and where rules cannot read one of {cost.judge_fallbacks:,} answers\n"
        f"disk: about {cost.disk_bytes / 1e6:.0f} MB"
    )
    return 0


def _status(plan: RunPlan, html: Path | None) -> int:
    from ivcp_eval.runs.progress import page, status
    from ivcp_eval.runs.progress.watch import Watch
    from ivcp_eval.runs.progress.words import duration

    watch = Watch(plan)
    if html:
        page.write(watch, html)
    tallies, left, eta = list(watch.tallies.values()), watch.total.left, watch.eta_s
    say(status.table(tallies))
    say(f"\n{left} samples left" + (f", about {duration(eta)}" if left and eta is not None else ""))
    if status.agreement(tallies):
        say(status.agreement(tallies))
    for text in status.uncounted(plan):
        say(text)
    for line in tallies:
        for reason in line.reasons:
            say(f"NOT WHOLE: {line.model} on {line.benchmark}: {reason}")
        for reason in line.skipped:
            say(f"cannot run: {line.model} on {line.benchmark}: {reason}")
    for problem in plan.problems:
        say(f"not here: {problem}")
    return int(any(line.reasons or line.failed for line in tallies))


def _follow(plan: RunPlan, args: argparse.Namespace) -> None:
    from ivcp_eval.runs.progress.display import REFRESH_S
    from ivcp_eval.runs.records.state import is_worked_on
    from ivcp_eval.runs.worker import Stop

    with Stop().signals() as stop, _progress(plan, args) as progress:
        idle = 0.0
        while not (progress.complete or stop.requested or idle > IDLE_S):
            time.sleep(REFRESH_S)
            idle = 0.0 if is_worked_on(plan) else idle + REFRESH_S
    if idle > IDLE_S:
        say(f"nobody has worked on it for {IDLE_S:.0f} s; `ivcp sweep run` goes on with what is left")


def _progress(plan: RunPlan, args: argparse.Namespace) -> Progress:
    from ivcp_eval.runs.progress.display import EVERY_S, Progress

    every = args.every or (EVERY_S if args.verb == "status" else 0.0)
    return Progress(plan, args.quiet, every, page=args.html, cells=args.verb == "status" and args.watch)


def _work(plan: RunPlan, args: argparse.Namespace) -> int:
    from ivcp_eval.runs.answering.samples import DeviceLost
    from ivcp_eval.runs.executors.local import LOST
    from ivcp_eval.runs.worker import Stop, work

    try:
        with Stop().signals() as stop, _progress(plan, args) as progress:
            report = work(
                plan, stop, progress.hooks, not args.no_answer, not args.no_score, args.model, not args.not_alone
            )
    except DeviceLost as lost:
        say(str(lost))
        return LOST
    return 75 if report.stopped else int(bool(report.broken))


def _run(plan: RunPlan, args: argparse.Namespace, device: str) -> int:
    progress = _progress(plan, args)
    if args.executor == "slurm":
        from ivcp_eval.runs.executors.slurm import Options, submit, wait

        further = dict(text.partition("=")[::2] for text in args.slurm)
        options = Options(
            args.array_limit, args.partition, args.gpus_per_task, args.cpus_per_task, args.minutes, further
        )
        tasks, score = submit(plan, options, device, str(args.html or ""))
        notices(args)(
            f"submitted {len(tasks)} tasks ({' '.join(tasks)}) and the scoring job {score}; logs: {plan.state / 'logs'}"
        )
        if not args.wait:
            notices(args)(f"watch it: ivcp sweep status {args.sweep} --follow")
            return 0
        if not wait([*tasks, score], progress):
            say("no longer waiting; the jobs go on")
            return 75
    else:
        from ivcp_eval.runs.answering.samples import DeviceLost
        from ivcp_eval.runs.executors.local import run as run_local

        try:
            if not run_local(plan, args.workers, progress, device):
                say("stopped; run the same command again to continue")
                return 75
        except DeviceLost as lost:
            say(str(lost))
            return 75
    return _report(plan.spec.name, plan.runs, bool(plan.problems), notices(args))


def _results(args: argparse.Namespace) -> int:
    """Results of the sweeps named, or of everything that ran below these runs, evaluations included."""
    from ivcp_eval.reports.csvfile import ResultsError
    from ivcp_eval.runs.planning import cells
    from ivcp_eval.runs.store import manifest

    runs = args.runs or cells.RUNS
    ran = sorted(path.parent.name for path in (runs.parent / "sweeps").glob("*/manifest.json"))
    evaluated = [] if args.sweep else sorted(path.parent for path in eval_state(runs, "").glob("*/manifest.json"))
    names = list(dict.fromkeys(Path(name).stem for name in args.sweep)) or ran
    if not names and not evaluated:
        say(f"nothing has run yet below {runs.parent}: no {runs.parent.name}/sweeps, no {runs.parent.name}/eval")
    codes = [0]
    for name in names:
        try:
            codes.append(_report(name, runs, False, notices(args)))
        except DamagedError as error:  # its manifest; the other sweeps' are whole
            say(f"ivcp: {error}", sys.stderr)
            codes.append(2)
    for state in evaluated:
        try:
            if manifest.read(state).get("runs", runs.name) == runs.name:  # else of another folder beside it
                codes.append(_renew(state, runs))
        except (DamagedError, ResultsError) as error:
            say(f"ivcp: {error}", sys.stderr)
            codes.append(2)
    return max(codes)


def _renew(state: Path, runs: Path) -> int:
    """Make the rows of one evaluation again; 1 if some have no score."""
    from ivcp_eval.runs.records.results import rebuild_evaluation

    csv, collected = rebuild_evaluation(state, runs)
    for text in [*collected.reasons("failed", "incomplete"), *collected.damaged]:
        say(f"NOT WHOLE: {text}")
    if collected.missing:
        say(f"{collected.missing} cells of an evaluation have no record; run its command again")
    say(f"{len(collected.rows)} rows renewed: {csv}")
    return int(bool(collected.missing or collected.reasons("failed", "incomplete")))


def _report(name: str, runs: Path, problems: bool, tell: Callable[[str], None]) -> int:
    """Build the results of a sweep and print them; ``tell`` takes what is neither a result nor an error."""
    from ivcp_eval.runs.records.results import build

    built = build(name, runs)
    for text in [*built.unfinished, *built.damaged]:
        say(f"NOT WHOLE: {text}")
    for text in built.skipped:
        tell(f"cannot run: {text}")
    if built.unscored:
        say(f"{built.unscored} cells of {name} were scored by an earlier version, which kept no scores.json: their "
            "rows cannot be made again and are left out; run the sweep again")  # fmt: skip
    if built.missing > built.unscored:
        say(f"{built.missing - built.unscored} cells of {name} have no record yet; run the sweep again")
    for table in built.tables:
        say("\n" + table.to_terminal())
    say(f"\nresults: {built.csv}, tables: {built.csv.with_suffix('')}")
    return int(bool(built.unfinished or built.missing or problems))
