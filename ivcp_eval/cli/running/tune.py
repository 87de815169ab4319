"""Find method, layer, schedule and ratio for a budget, on a validation split."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ivcp_eval.cli import notices, say
from ivcp_eval.cli.running.analyse import add_study, bar, finish, folder, prepared, request
from ivcp_eval.runs.planning.numbers import COUNT, INDEX, SHARE

if TYPE_CHECKING:
    from ivcp_eval.runs.analysis.study import Study

HIDDEN = ("method", "parameters", "budget", "rung", "failed")
READING = (
    "asked: share of the unpruned model's cost that the ratio was solved for; flops, layer_mean, kept: measured. "
    "Differences to the unpruned model are in points, with 95 % intervals over pictures, not corrected for choosing "
    "the best of many: measure that one on the test split. The CSV also has those that left early.\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add_study(parser)
    add = parser.add_argument
    add("--data", default="tiny_grounding", metavar="NAME", help="benchmark, or a file of your own pictures "
        "(default: %(default)s)")  # fmt: skip
    add("--budget", required=True, metavar="KIND=SHARE", help="flops=0.5 (of the unpruned prefill), or tokens=0.5 "
        "(visual tokens processed, mean over layers)")  # fmt: skip
    add("--methods", nargs="+", default=["ivc_prune", "fastv", "pyramiddrop", "random"], metavar="NAME",
        help="that compete (default: %(default)s)")  # fmt: skip
    add("--layers", type=INDEX, nargs="+", help="where methods with one cut are tried (default: their own, and up to "
        "eight, evenly spread)")  # fmt: skip
    add("--first", type=COUNT, default=16, help="samples of the first rung (default: %(default)s)")
    add("--samples", type=COUNT, default=128, help="samples of the last rung (default: %(default)s)")
    add("--eta", type=COUNT, default=3, help="one candidate of so many goes on, to so many times more samples "
        "(default: %(default)s)")  # fmt: skip
    add("--validation-share", type=SHARE, default=0.5, help="share of the rows that are validation, by the hash of "
        "their picture or index; for the embedded benchmarks scenes are generated (default: %(default)s)")  # fmt: skip
    add(
        "--seed", type=INDEX, default=0, help="of the order of samples, and of methods that draw (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Search, print and write; 0."""
    from ivcp_eval.runs.analysis import tune
    from ivcp_eval.runs.analysis.study import NO_METHODS, Study, text

    kind, target = tune.budget(args.budget)
    settings = tune.Settings(
        *(kind, target, tuple(args.methods), args.layers, args.first, args.samples, args.eta),
        *(args.validation_share, args.seed),
    )
    (args.data,) = prepared(args, [args.data])
    raw = request(args, args.data, NO_METHODS)
    study = Study.of(raw, folder(args), notices(args))
    rule = _validation(study, settings.share)
    notices(args)(f"validation split: {rule}")
    rows, outcome, race = tune.search(study, raw, settings, rule, bar(args))
    shown = text([row for row in rows if row["front"] or row is rows[0]], HIDDEN)
    name = f"tune/{args.model}-{args.data}-{args.budget}"
    path = finish(args, name, rows, race.provenance(outcome), shown, READING)
    tune.write_plot(rows, settings, f"{args.model} on {args.data}, {args.budget}", path.with_suffix(".png"))
    say(f"plot: {path.with_suffix('.png')}")
    best = max((row for row in rows if row["front"] == "yes"), key=lambda row: float(row["score"]))
    say(f"best within the budget: {best['candidate']}; on the test split:")
    say(f"  {tune.command(best, args.model, args.data)}")
    return 0


def _validation(study: Study, share: float) -> str:
    """Leave the validation split in the study; returns the rule in words."""
    from ivcp_eval.lab.tiny.build_benchmarks import BENCHMARKS, content
    from ivcp_eval.runs.analysis import tune

    if study.benchmark.file in BENCHMARKS:
        return tune.validation_file(study, content(study.benchmark.file, "validation"))
    return tune.split(study, share)
