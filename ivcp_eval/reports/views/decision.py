"""May a pruned variant be deployed? A verdict per variant by a rule that is stated before it is applied.

The rule: a variant is GO where, on every critical benchmark, a loss of the margin or more is refuted (one-sided
non-inferiority tests on the same samples; all have to pass, so nothing is corrected over benchmarks), after Holm's
correction over the variants of a model. It is NO-GO where on some critical benchmark a loss of the margin or less is
refuted, after Holm's correction over variants and critical benchmarks. All else is UNDECIDED.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from typing import IO, Any, Literal

from ivcp_eval.benchmarks import agreement, headline
from ivcp_eval.files import as_shown
from ivcp_eval.interface.marked import Marked
from ivcp_eval.interface.registry import unknown
from ivcp_eval.interface.variants import BASELINE
from ivcp_eval.reports import stats
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.comparison import ComparedRow, Comparison
from ivcp_eval.reports.provenance import AGAIN
from ivcp_eval.reports.stats.margins import LossTest, clusters_to_decide, loss_test
from ivcp_eval.reports.stats.timing import STAGES
from ivcp_eval.reports.table import Row, read_results
from ivcp_eval.reports.terminal import time_lost
from ivcp_eval.reports.views.costs import Costs, decoder_sizes, join, mebibytes

__all__ = ["Decision", "Policy", "Verdict", "decide", "kv_bytes"]

Word = Literal["GO", "NO-GO", "UNDECIDED"]
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Policy:
    """What is acceptable.

    Attributes:
        margin: loss, in percent of a metric's scale, that is too much. alpha: chance of a false GO for any variant.
        critical: benchmarks that decide; empty: all of a variant. minimum_n: samples below which nothing is decided.
        sha256: of the policy's file; empty where the command line said it.
    """

    margin: float
    alpha: float = 0.05
    critical: tuple[str, ...] = ()
    minimum_n: int = 0
    sha256: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.margin < 100:
            raise ValueError(f"margin must be above 0 and below 100 percent of the scale, got {self.margin!r}")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must be above 0 and below 0.5, got {self.alpha!r}")

    @classmethod
    def read(cls, path: Path) -> Policy:
        """From a YAML file with ``margin`` and, where they differ, ``alpha``, ``critical`` and ``minimum_n``.

        Raises:
            FileNotFoundError: there is none. SpecError: what is wrong, with its line.
        """
        marked = Marked(path)
        raw = marked.keys((), marked.value, ("margin", "alpha", "critical", "minimum_n"))
        if "margin" not in raw:
            raise marked.error((), "margin is missing: which loss, in percent of the scale, is too much?")
        for key, kind in (("margin", int | float), ("alpha", int | float), ("minimum_n", int)):
            if not isinstance(raw.get(key, 0), kind) or isinstance(raw.get(key), bool):
                raise marked.error((key,), f"{key} must be a number, got {raw[key]!r}")
        critical = marked.listed(("critical",), raw.get("critical", []), str, "the name of a benchmark")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        try:
            return cls(
                float(raw["margin"]), float(raw.get("alpha", 0.05)), tuple(critical), raw.get("minimum_n", 0), digest
            )
        except ValueError as error:
            raise marked.error((), str(error)) from None

    @property
    def rule(self) -> str:
        """In one sentence."""
        on = "every critical benchmark (" + ", ".join(self.critical) + ")" if self.critical else "every benchmark"
        least = f" with at least {self.minimum_n} samples" if self.minimum_n else ""
        return (
            f"GO if on {on}{least} a loss of {self.margin:g} % of the scale or more is refuted (paired one-sided "
            f"non-inferiority tests, Holm over the variants of a model, alpha {self.alpha:g}); NO-GO if on one of them "
            "a loss of at most that is refuted (Holm over variants and benchmarks); else UNDECIDED."
        )


@dataclass(frozen=True)
class Verdict:
    """One variant. Missing: NaN or an empty text.

    Attributes:
        word: the verdict. why: in words, with its numbers. p_go, p_no_go: after correction.
        benchmark: the one that is nearest to failing. difference, lowest: there, in percent of the scale; the lower end
            of the one-sided interval, uncorrected.
        more_samples: of that benchmark that would decide, if the difference stays as it is (80 % power).
        prefill, first_token (of servers), decode, end_to_end: time over the baseline's, geometric mean over benchmarks,
            where measured.
        kv: measured share of the visual tokens in the KV cache. kv_bytes_saved: of one prompt, by the decoder's sizes.
        flops, layers: measured shares of the prefill's FLOPs and of visual tokens over layers.
        requests_per_hour: of one device, where a bench was joined (`Costs.best`).
    """

    model: str
    variant: str
    word: Word
    why: str
    p_go: float
    p_no_go: float
    benchmark: str
    difference: float
    lowest: float
    more_samples: float
    prefill: float
    first_token: float
    decode: float
    end_to_end: float
    kv: float
    kv_bytes_saved: float
    flops: float
    layers: float
    requests_per_hour: float = math.nan


@dataclass(frozen=True)
class Decision:
    """What `decide` returns.

    Attributes:
        policy: the rule. verdicts: in the order of the results. cheapest: model -> the passing variant that costs
            least, and by which measure. left_out: rows that could not be compared. results: path of the file.
        costs: of a bench; None where there is none.
    """

    policy: Policy
    verdicts: tuple[Verdict, ...]
    cheapest: Mapping[str, tuple[str, str]]
    left_out: tuple[str, ...]
    results: str
    notes: tuple[str, ...] = field(default=())
    costs: Costs | None = None

    @property
    def exit_code(self) -> int:
        """0: some variant is GO; 1: all are NO-GO; 3: none is GO, some are undecided."""
        words = {verdict.word for verdict in self.verdicts}
        return 0 if "GO" in words else 1 if words == {"NO-GO"} else 3

    def to_json(self) -> dict[str, Any]:
        """Everything, NaN and infinity as None."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {
            "results": self.results,
            "rule": self.policy.rule,
            "policy": asdict(self.policy),
            "verdicts": [{name: plain(value) for name, value in asdict(one).items()} for one in self.verdicts],
            "cheapest": {model: {"variant": name, "by": by} for model, (name, by) in self.cheapest.items()},
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "costs": None if self.costs is None else self.costs.to_json(),
            "exit_code": self.exit_code,
        }

    def write_csv(self, stream: IO[str]) -> None:
        """One line per variant, the policy beside each."""
        writer = csv.writer(stream, lineterminator="\n")
        first = asdict(self.verdicts[0])
        writer.writerow([*first, "cheapest", "margin", "alpha", "critical", "minimum_n", "policy_sha256"])
        policy = self.policy
        for one in self.verdicts:
            cells = [*asdict(one).values(), self.cheapest.get(one.model, ("",))[0] == one.variant]
            cells += [policy.margin, policy.alpha, " ".join(policy.critical), policy.minimum_n, policy.sha256]
            writer.writerow(["" if c != c else as_shown(c) if isinstance(c, str) else c for c in cells])

    def to_terminal(self, width: int | None = None) -> str:
        """The rule, a table, and what to know."""
        from ivcp_eval.reports.terminal import fold

        some = self.verdicts
        columns: dict[str, list[str]] = {
            "model": [one.model for one in some],
            "variant": [one.variant for one in some],
            "verdict": [one.word for one in some],
            "time: prefill": [_share(one.prefill) for one in some],
            "decode": [_share(one.decode) for one in some],
            "end to end": [_share(one.end_to_end) for one in some],
            "KV": [_share(one.kv) for one in some],
            "KV saved": [mebibytes(one.kv_bytes_saved) for one in some],
            "requests/h": ["" if math.isnan(one.requests_per_hour) else f"{one.requests_per_hour:.0f}" for one in some],
            "why": [one.why for one in some],
        }
        columns = {name: cells for name, cells in columns.items() if any(cells)}
        lines = [f"Rule: {self.policy.rule}"]
        lines += [f"Policy: sha256 {self.policy.sha256}"] if self.policy.sha256 else []
        lines += ["", fold(columns, ("model", "variant"), "why", width), ""]
        for model, (name, by) in self.cheapest.items():
            lines.append(f"Cheapest that passes, {model}: {name} (by {by}).")
        lines += ["No variant passes."] if not self.cheapest else []
        lines.append(
            "Times are over the baseline's for the same samples, where timed; KV: share of visual tokens in the cache."
        )
        costs = [] if self.costs is None else ["", self.costs.to_terminal(width)]
        return "\n".join([*lines, *self.notes, *(f"Not compared: {line}" for line in self.left_out), *costs])


def decide(
    results_csv: str | Path,
    policy: Policy,
    baseline_csv: str | Path | None = None,
    *,
    force: bool = False,
    select: Callable[[Row], bool] = lambda row: True,
    resamples: int = 10_000,
    bench: Sequence[Path] = (),
) -> Decision:
    """Apply a policy to every variant of a results CSV, on the headline metric of each benchmark.

    Args:
        bench: CSV files of costs; by default the one beside the results (`costs.join`).

    Raises:
        As `compare` and `costs.join`; ValueError: a critical benchmark that the results do not have.
    """
    rows = read_results(results_csv)
    there = sorted({row["benchmark"] for row in rows})
    for name in policy.critical:
        if name not in there:
            raise unknown("critical benchmark", name, there)

    def selected(row: Row) -> bool:
        return row["metric"] == headline(row) and row["method"] not in (BASELINE, AGAIN) and select(row)

    comparison = compare(results_csv, baseline_csv, force=force, resamples=resamples, select=selected)
    groups: dict[str, dict[tuple[str, str, int | None], list[ComparedRow]]] = {}
    for row in comparison.rows:
        groups.setdefault(row.model, {}).setdefault((row.variant, row.baseline_source, row.limit), []).append(row)
    folder = Path(results_csv).parent
    costs = join(comparison.rows, Path(results_csv), rows, bench)
    verdicts = []
    for of in groups.values():
        # Without critical benchmarks all that any variant of the model has: none passes by having fewer.
        needed = policy.critical or tuple(dict.fromkeys(row.benchmark for own_rows in of.values() for row in own_rows))
        own = [_Candidate(variant, own_rows, policy, needed) for (variant, *_), own_rows in of.items()]
        go = stats.holm([one.p_go for one in own])
        no_go = stats.holm([p for one in own for p in one.p_worse])
        for one, p in zip(own, go, strict=True):
            worst = min(no_go[: len(one.p_worse)], default=math.nan)
            no_go = no_go[len(one.p_worse) :]
            verdict = one.verdict(float(p), float(worst), len(own), folder, rows)
            if best := costs and costs.best(verdict.model, verdict.variant):
                verdict = replace(verdict, requests_per_hour=best.bench.requests_per_hour)
            verdicts.append(verdict)
    return Decision(
        policy,
        tuple(verdicts),
        _cheapest(verdicts),
        comparison.left_out,
        str(results_csv),
        _notes(comparison),
        costs,
    )


def _notes(comparison: Comparison) -> tuple[str, ...]:
    notes = [f"FORCED although settings differ: {line}" for line in comparison.forced]
    agreed = dict.fromkeys(row.metric for row in comparison.rows if row.metric in agreement.METRICS)
    notes += [f"{', '.join(agreed)}: {agreement.NOTE}."] if agreed else []
    notes += time_lost(comparison.rows)
    return (*notes, *(["RANDOM WEIGHTS: nothing is decided."] if comparison.meaningless else []))


class _Candidate:
    """A variant before correction over variants."""

    def __init__(self, variant: str, rows: Sequence[ComparedRow], policy: Policy, needed: Sequence[str]) -> None:
        self.variant, self.rows, self.policy = variant, rows, policy
        self.deciding = [row for row in rows if row.benchmark in needed]
        self.tests = {row.benchmark: _tested(row, policy) for row in self.deciding}
        self.missing = [name for name in needed if name not in self.tests]

    @property
    def obstacle(self) -> str:
        """What forbids any decision, in words."""
        if self.missing:
            return f"no row of {', '.join(self.missing)}"
        if not all(row.trained_weights for row in self.deciding):
            return "random weights"
        few = [row.benchmark for row in self.deciding if (row.n_samples or 0) < self.policy.minimum_n]
        if few:
            return f"fewer than {self.policy.minimum_n} samples of {', '.join(few)}"
        untested = [name for name, test in self.tests.items() if test is None]
        return f"no test of {', '.join(untested)}: the scores alone do not say how sure they are" if untested else ""

    @property
    def p_go(self) -> float:
        """Of the benchmark nearest to failing: all have to pass."""
        return 1.0 if self.obstacle else max(test.p_not_worse for test in self.tests.values() if test)

    @property
    def p_worse(self) -> list[float]:
        """One p-value per deciding benchmark."""
        return [1.0 if self.obstacle or test is None else test.p_worse for test in self.tests.values()]

    def verdict(self, p_go: float, p_no_go: float, variants: int, folder: Path, rows: Sequence[Row]) -> Verdict:
        """With the corrected p-values."""
        alpha, margin = self.policy.alpha, self.policy.margin
        word: Word = "GO" if p_go <= alpha else "NO-GO" if p_no_go <= alpha else "UNDECIDED"
        tested = [(row, test) for row in self.deciding if (test := self.tests[row.benchmark])]
        row, test = max(tested, key=lambda pair: pair[1].p_not_worse, default=(self.rows[0], None))
        more = difference = lowest = math.nan
        why = self.obstacle
        if test is not None:
            unit = 100 / row.score_scale
            difference, lowest = unit * row.difference, unit * test.lowest
            clusters = row.n_clusters or row.n_samples or 1
            needed = clusters_to_decide(row.difference, test.error, clusters, _margin(row, margin), alpha / variants)
            samples = row.n_samples or clusters
            more = max(0.0, needed / clusters - 1) * samples if word == "UNDECIDED" and not why else math.nan
            p_value = p_no_go if word == "NO-GO" else p_go
            said = f"{row.benchmark} {difference:+.2f} %, at least {lowest:+.2f} %, p {p_value:.2g}"
            why = f"{why}; {said}" if why else said
            if math.isfinite(more):
                why += f"; about {max(1, math.ceil(more))} more samples would decide"
        saved = [_kv_bytes_saved(row, folder, rows) for row in self.rows]
        return Verdict(
            model=self.rows[0].model,
            variant=self.variant,
            word=word,
            why=why,
            p_go=p_go,
            p_no_go=p_no_go,
            benchmark=row.benchmark if test else "",
            difference=difference,
            lowest=lowest,
            more_samples=more,
            **{stage: _geometric([r.times[stage].ratio for r in self.rows]) for stage in STAGES},
            kv=_mean([r.ratio_kv_cache for r in self.rows]),
            kv_bytes_saved=_mean(saved),
            flops=_mean([r.ratio_flops for r in self.rows]),
            layers=_mean([r.ratio_layer_mean for r in self.rows]),
        )


def _margin(row: ComparedRow, percent: float) -> float:
    return percent * row.score_scale / 100


def _tested(row: ComparedRow, policy: Policy) -> LossTest | None:
    n_clusters = row.n_clusters or row.n_samples or 0
    margin = _margin(row, policy.margin)
    return loss_test(row.difference, row.standard_error, n_clusters, margin, row.score_scale, policy.alpha)


def _cheapest(verdicts: Sequence[Verdict]) -> dict[str, tuple[str, str]]:
    """Per model the passing variant of least cost, by the first measure that all that pass have."""
    measures = {"requests_per_hour": "requests per hour of one device, measured by the bench"}
    measures |= {"end_to_end": "measured time end to end", "prefill": "measured time of the prefill"}
    measures |= {"flops": "measured FLOPs of the prefill", "layers": "measured tokens, mean over layers"}
    cheapest = {}
    for model in dict.fromkeys(one.model for one in verdicts):
        passing = [one for one in verdicts if one.model == model and one.word == "GO"]
        for name, words in measures.items():
            if passing and not any(math.isnan(getattr(one, name)) for one in passing):
                best = max if name == "requests_per_hour" else min
                cheapest[model] = best(passing, key=attrgetter(name)).variant, words
                break
        else:
            if passing:
                cheapest[model] = passing[0].variant, "nothing measured; the first one"
    return cheapest


def kv_bytes(row: Row, predictions: Path | None) -> float:
    """What the visual tokens of one unpruned prompt take in the KV cache, by the decoder's sizes that stand beside the
    samples; NaN where they do not."""
    if predictions is None or row["visual_tokens_prompt_mean"] is None or row["dtype"] not in _ITEMSIZE:
        return math.nan
    decoder = decoder_sizes(predictions)
    if not decoder:
        return math.nan
    width = decoder["kv_heads"] * (decoder["head_dim"] + (decoder.get("value_dim") or decoder["head_dim"]))
    token = decoder["layers"] * width * _ITEMSIZE[row["dtype"]]
    return float(row["visual_tokens_prompt_mean"] * token)


def _kv_bytes_saved(compared: ComparedRow, folder: Path, rows: Sequence[Row]) -> float:
    names = ("model", "benchmark", "metric", "method", "method_parameters", "ratio_asked", "budget", "limit")
    row = next((row for row in rows if all(row[name] == getattr(compared, name) for name in names)), None)
    if row is None or not row["predictions"]:
        return math.nan
    return (1 - compared.ratio_kv_cache) * kv_bytes(row, folder / row["predictions"])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def _geometric(values: Sequence[float]) -> float:
    known = [math.log(value) for value in values if not math.isnan(value)]
    return math.exp(fmean(known)) if known else math.nan


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}x"
