"""Which method, layer, schedule and ratio for a budget? Successive halving on a validation split, without training.

VisPCO (arXiv 2604.15188) learns where and how much to prune under a FLOP budget and is held to the front that a grid
search finds. This is that search, made cheap: every candidate holds a share of the budget exactly (its ratio is solved
for, `engine.cost.predicted`), all candidates answer a sample in one pass (`engine.fork`), and after each rung only
the better ones of each share go on to more samples. Nothing of the test split is asked or scored.

Paper: https://arxiv.org/abs/2604.15188 (its sigmoid kernel over layers is here a schedule of one or several cuts).
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ivcp_eval.engine.cost.measured import Shares, measured
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.registry import adapter, default_parameters
from ivcp_eval.interface.variants import KINDS, BudgetKind, text_of
from ivcp_eval.reports.stats import PairedResult, paired_bootstrap
from ivcp_eval.runs.analysis.study import Question, Study, label, named
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.records.scores import Sample

#: Words of ``--budget`` -> kind; "tokens" are those that the prefill processes, mean over layers.
BUDGETS: Mapping[str, BudgetKind] = {"tokens": "layer_mean", **{kind: kind for kind in KINDS}}
LEVELS = (1.0, 0.85, 0.7, 0.55)  # shares of the budget at which candidates are placed
_MOST_LAYERS = 8
_STARTS, _STAGES = (0.125, 0.25, 0.5), (1, 2, 3, 4)
_UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Settings:
    """How to search.

    Attributes:
        kind, target: of the budget, a share of the unpruned model in (0, 1).
        methods: that compete. layers: at which those with one cut are tried; None for their own and up to eight, evenly
            spread.
        first, samples: of the first and of the last rung. eta: each rung has so many times more samples, and one of so
            many candidates goes on to it.
        share: of the rows that are validation, where no file says. seed: of the order of samples, and of methods.
    """

    kind: BudgetKind
    target: float
    methods: Sequence[str]
    layers: Sequence[int] | None = None
    first: int = 16
    samples: int = 128
    eta: int = 3
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(
                f"a budget of {self.target:g} is outside (0, 1): it is a share of the unpruned model's cost"
            )
        if self.first < 2 or self.samples < self.first or self.eta < 2:
            raise ValueError(
                f"--first {self.first}, --samples {self.samples}, --eta {self.eta}: the first rung needs at least 2 "
                "samples, the last as many or more, and eta must be 2 or more"
            )
        if not 0 < self.share < 1:
            raise ValueError(f"a validation share of {self.share:g} is outside (0, 1)")


def budget(text: str) -> tuple[BudgetKind, float]:
    """``flops=0.5`` or ``tokens=0.5`` as (kind, target). Raises ValueError for anything else."""
    word, _, number = text.partition("=")
    try:
        return BUDGETS[word], float(number)
    except (KeyError, ValueError):
        raise ValueError(f"budget {text!r} is not KIND=SHARE with KIND one of {', '.join(BUDGETS)}") from None


def entries(settings: Settings, n_layers: int, first_cut: int = 0) -> list[dict[str, Any]]:
    """The search space as the methods of a sweep file: every layer or schedule, at every level of the budget.

    A method's parameter ``layer`` is its one cut; ``depths``, as of PyramidDrop, are the stages of its schedule.

    Raises:
        ValueError: an unknown method, or one that a layer was given for and that has none.
    """
    shared = {"ratios": [round(settings.target * level, 6) for level in LEVELS], "budget": settings.kind}
    lowest = max(1, first_cut)
    spread = np.linspace(lowest, n_layers - 1, min(_MOST_LAYERS, n_layers - lowest)).tolist()
    methods = []
    for method in settings.methods:
        has = default_parameters(method)
        grids: list[dict[str, list[Any]]] = []
        if "layer" in has:
            grids.append({"layer": sorted(settings.layers or set(map(round, spread)))})
        if "depths" in has:
            stages = [(start, stages) for start in _STARTS for stages in _STAGES]
            grids.append({"depths": [[round(s + (1 - s) * i / n, 4) for i in range(n)] for s, n in stages]})
        if not grids or settings.layers is None:
            grids.append({})  # where the method cuts by itself
        methods += [{**shared, "method": method, "parameters": grid, "seeds": [settings.seed]} for grid in grids]
    return methods


def is_validation(cell: str, share: float) -> bool:
    """Whether a sample, or all on one picture, is in the validation split: by the SHA-256 of its identifier."""
    return int.from_bytes(hashlib.sha256(cell.encode()).digest()[:8], "big") < share * 2**64


def split(study: Study, share: float) -> str:
    """Take the rows of the study that are not validation out of it, for good; returns the rule in words.

    Raises:
        ValueError: no row is left.
    """
    data, column = study.dataset.data, study.benchmark.cluster
    if column not in data:
        column = "index"
    study.dataset.data = data[[is_validation(str(cell), share) for cell in data[column]]]
    n = len(study.dataset.data)
    rule = f"rows whose SHA-256 of {column!r} is in the lowest {share:g} of its range: {n} of {len(data)}"
    if not n:
        raise ValueError(f"no {rule}; raise --validation-share or --limit")
    return rule


def validation_file(study: Study, content: bytes) -> str:
    """Put the rows of a validation file into the study in place of the benchmark's own; returns the rule in words."""
    from ivcp_eval.vlmeval_bridge.datasets import of_file

    digest = hashlib.sha256(content).hexdigest()
    path = study.folder / "validation" / f"{study.benchmark.name}-{digest[:12]}.tsv"
    if not path.is_file():
        from ivcp_eval.files import atomic_write

        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as stream:
            stream.write(content)
    study.dataset = of_file(study.benchmark, path)
    return f"generated validation scenes, {len(study.dataset.data)} rows, sha256 {digest}"


@dataclass
class Candidate:
    """One variant in the race.

    Attributes:
        level: share of the unpruned cost that it was placed at. answers, samples: of the questions so far, by index.
        rung: the last one it took part in.
    """

    cell: Cell
    level: float
    answers: dict[str, Answer]
    samples: dict[str, Sample]
    rung: int = 0

    @property
    def score(self) -> float:
        """Mean over its samples, in percent."""
        return 100 * float(np.mean([sample.score or 0 for sample in self.samples.values()]))


def search(
    study: Study,
    request: Mapping[str, Any],
    settings: Settings,
    rule: str,
    bar: Callable[[Sequence[Any]], Any] = iter,
) -> tuple[list[dict[str, Any]], dict[str, Any], Study]:
    """All candidates with their scores and costs, how they were found, and the study of the candidates.

    Args:
        study: the unpruned model on the rows of the validation split. request: of the study, to which candidates are
            added. rule: the split in words. bar: shows the progress.

    Raises:
        ValueError: no candidate can hold the budget, or fewer rows than the first rung needs.
    """
    order = study.questions()
    order = [order[i] for i in np.random.default_rng(settings.seed).permutation(len(order))][: settings.samples]
    if len(order) < settings.first:
        raise ValueError(
            f"{len(order)} validation rows are fewer than the {settings.first} of the first rung (--first)"
        )
    journal = study.digest("tune")
    with study.kept(journal):
        whole = Candidate(study.baseline, 1.0, {}, {})
        _ask(study, [whole], order[: settings.first], bar)
    prompt = _typical(list(whole.answers.values()))
    wired = adapter(study.model.weights.family)
    facts = wired.facts(wired.config(str(study.model.weights.source)), study.model.weights.family)
    raw = {**request, "methods": entries(settings, facts.n_layers, facts.first_cut), "budget_prompt": list(prompt)}
    race = Study.of(raw, study.folder, study.tell, study.dataset)
    race.session = study.session
    alive, left_out = _able(race)
    if not alive:
        raise ValueError(f"no candidate holds {settings.kind}={settings.target:g}: {'; '.join(left_out[:3])}")
    race.cells = (race.baseline, *(candidate.cell for candidate in alive))
    study.tell(
        f"{len(alive)} candidates, {len(left_out)} left out; prompts of {prompt[0]} visual and {prompt[1]} text tokens"
    )
    everybody, sizes = list(alive), _sizes(settings, len(order))
    with race.kept(journal):
        for rung, n in enumerate(sizes):
            study.tell(f"rung {rung + 1} of {len(sizes)}: {len(alive)} candidates on {n} samples")
            _ask(race, [whole, *alive], order[:n], bar)
            for candidate in alive:
                candidate.rung = rung + 1
            if rung + 1 < len(sizes):
                alive = halved(alive, settings.eta)
    outcome: dict[str, Any] = {
        "settings": {**vars(settings), "methods": list(settings.methods)},
        **{"prompt": list(prompt), "split": rule, "rungs": sizes, "left_out": left_out, "digest": journal},
    }
    return _table(everybody, whole, race, settings, len(sizes)), outcome, race


def _ask(study: Study, candidates: Sequence[Candidate], questions: Sequence[Question], bar: Any) -> None:
    conditions = {named(candidate.cell): candidate.cell.identity.variant for candidate in candidates}
    for question in bar(questions):
        answers = study.answers(question, conditions)
        for candidate in candidates:
            candidate.answers[question.index] = answers[named(candidate.cell)]
    for candidate in candidates:
        candidate.samples = study.samples(candidate.answers)


def _typical(answers: Sequence[Answer]) -> tuple[int, int]:
    """Median (visual, text) tokens of prompts, for which budgets are held."""
    visual = [answer.visual_tokens for answer in answers if answer.visual_tokens]
    text = [answer.text_tokens for answer in answers if answer.text_tokens is not None]
    if not visual:
        raise ValueError(f"the unpruned model answers nothing: {answers[0].error or 'its prompts have no picture'}")
    return round(statistics.median(visual)), round(statistics.median(text))


def _able(study: Study) -> tuple[list[Candidate], list[str]]:
    """Candidates that hold their budget on this model, and why others do not."""
    able, reasons = [], []
    for cell in {named(cell): cell for cell in study.pruned}.values():
        variant = cell.identity.variant
        try:
            study.session.check(variant)
        except ValueError as error:
            reasons.append(f"{label(variant)}: {error}")
        else:
            able.append(Candidate(cell, variant.requested, {}, {}))
    return able, reasons


def _sizes(settings: Settings, available: int) -> list[int]:
    """Samples of each rung, the last with all."""
    sizes, n = [], settings.first
    while n < available:
        sizes.append(n)
        n *= settings.eta
    return [*sizes, available]


def halved(candidates: Sequence[Candidate], eta: int) -> list[Candidate]:
    """Of each level of cost the best one in ``eta``, at least one; of equal ones the first."""
    kept: list[Candidate] = []
    for level in dict.fromkeys(candidate.level for candidate in candidates):
        own = [candidate for candidate in candidates if candidate.level == level]
        kept += sorted(own, key=lambda candidate: -candidate.score)[: math.ceil(len(own) / eta)]
    return kept


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, score) no other beats: none is at most as costly and at least as good, and better in one of both."""
    return [not any(c <= cost and s >= score and (c < cost or s > score) for c, s in points) for cost, score in points]


def _table(
    candidates: Sequence[Candidate], whole: Candidate, study: Study, settings: Settings, last: int
) -> list[dict[str, Any]]:
    """The unpruned model, then candidates by rung and score."""
    column = {"flops": "flops", "layer_mean": "layer_mean", "final": "kept"}[settings.kind]
    ordered = sorted(candidates, key=lambda candidate: (-candidate.rung, -candidate.score))
    rows = [_row(candidate, whole, study, last) for candidate in (whole, *ordered)]
    finalists = [row for row in rows if row["rung"] == last and row["candidate"] != _UNPRUNED]
    best = front([(row[column], row["score"]) for row in finalists])
    for row, on_front in zip(finalists, best, strict=True):
        row["front"] = "yes" if on_front else "no"
    return rows


def _row(candidate: Candidate, whole: Candidate, study: Study, last: int) -> dict[str, Any]:
    variant = candidate.cell.identity.variant
    shape = study.session.shape
    good = [answer for answer in candidate.answers.values() if not answer.error]
    shares = [
        measured(a.visual_tokens or 0, a.text_tokens or 0, a.visual_per_layer, a.visual_cached, shape) for a in good
    ]
    result: PairedResult | None = None
    if candidate is not whole:
        common = [index for index in candidate.samples if index in whole.samples]
        before, after = ([of[index].score or 0 for index in common] for of in (whole.samples, candidate.samples))
        result = paired_bootstrap(before, after, [whole.samples[index].cluster for index in common], scale=100)
    interval = result.difference_interval if result else None
    return {
        "candidate": _name(candidate.cell) if result else _UNPRUNED,
        "method": variant.method,
        "parameters": json.dumps(dict(variant.parameters), sort_keys=True, default=str),
        "ratio": variant.ratio,
        "budget": variant.budget.label if variant.budget else "",
        "asked": candidate.level,
        "rung": candidate.rung if result else last,
        "n": len(candidate.samples),
        "score": candidate.score,
        "difference": result.difference if result else None,
        "difference_low": interval.low if interval else None,
        "difference_high": interval.high if interval else None,
        "flops": _mean(shares, "flops"),
        "layer_mean": _mean(shares, "layer_mean"),
        "kept": float(np.mean([(a.visual_kept or 0) / a.visual_tokens for a in good if a.visual_tokens]))
        if good
        else math.nan,
        "failed": len(candidate.answers) - len(good),
        "front": "",
    }


def _name(cell: Cell) -> str:
    """The method, and where it cuts."""
    where = {name: value for name, value in cell.identity.method_parameters.items() if name in ("layer", "depths")}
    return " ".join([cell.identity.variant.method, *(f"{name}={text_of(value)}" for name, value in where.items())])


def _mean(shares: Sequence[Shares], name: str) -> float:
    values = [value for share in shares if (value := getattr(share, name)) is not None]
    return float(np.mean(values)) if values else math.nan


def command(row: Mapping[str, Any], model: str, data: str) -> str:
    """The ``ivcp eval`` that measures a candidate on the test split."""
    parameters = json.loads(row["parameters"])
    given = " ".join(f"{name}={json.dumps(value, separators=(',', ':'))}" for name, value in parameters.items())
    words = f"ivcp eval --model {model} --data {data} --method {row['method']} --ratio {row['ratio']:.6g}"
    return f"{words} --set {given}" if given else words


def write_plot(rows: Sequence[Mapping[str, Any]], settings: Settings, title: str, path: Path) -> None:
    """Score against measured cost: finalists, intervals of their difference to the unpruned model, and their front."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from ivcp_eval.files import commit_file, disk_full_as_clear_error

    column, words = {
        "flops": ("flops", "measured share of the prefill's FLOPs"),
        "layer_mean": ("layer_mean", "measured visual tokens, mean over layers"),
        "final": ("kept", "measured visual tokens after the last cut"),
    }[settings.kind]
    whole, finalists = rows[0], [row for row in rows if row["front"]]
    early = [row for row in rows[1:] if not row["front"]]
    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    axis.axhline(whole["score"], color="black", linewidth=1, label="unpruned")
    axis.axvline(settings.target, color="grey", linewidth=1, linestyle="dotted", label="budget")
    axis.plot(
        [r[column] for r in early],
        [r["score"] for r in early],
        ".",
        color="lightgrey",
        label="left early (fewer samples)",
    )
    for method in dict.fromkeys(row["method"] for row in finalists):
        own = [row for row in finalists if row["method"] == method]
        low = [row["difference"] - row["difference_low"] for row in own]
        high = [row["difference_high"] - row["difference"] for row in own]
        axis.errorbar(
            [r[column] for r in own], [r["score"] for r in own], yerr=[low, high], fmt="o", capsize=2, label=method
        )
    best = sorted((row for row in finalists if row["front"] == "yes"), key=lambda row: float(row[column]))
    axis.plot([row[column] for row in best], [row["score"] for row in best], color="black", label="Pareto front")
    axis.set(title=title, xlabel=words, ylabel="score on the validation split")
    axis.legend(fontsize=7)
    temporary = path.with_suffix(f".tmp{path.suffix}")
    with disk_full_as_clear_error(path, temporary):
        figure.savefig(temporary, dpi=110)
        pyplot.close(figure)
        commit_file(temporary, path)
