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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter, itemgetter
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
from ivcp_eval.reports.comparison import ComparedRow, Comparison, NoiseFloor
from ivcp_eval.reports.provenance import AGAIN, variant_key
from ivcp_eval.reports.stats.margins import clusters_to_decide
from ivcp_eval.reports.stats.timing import STAGES
from ivcp_eval.reports.table import Row, read_results
from ivcp_eval.reports.terminal import FLOOR, floor_text, time_lost
from ivcp_eval.reports.views.costs import Costs, decoder_sizes, join, mebibytes

__all__ = ["Decision", "Policy", "Verdict", "decide", "kv_bytes"]

Word = Literal["GO", "NO-GO", "UNDECIDED"]
#: Timed samples of a benchmark below which its times choose no cheapest variant.
LEAST_TIMED = 8
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
        if self.minimum_n < 0:
            raise ValueError(f"minimum_n is a number of samples, 0 or more; got {self.minimum_n!r}")

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
        benchmark: the one that decides, or that is farthest from it. difference, lowest, highest: there, in percent of
            the scale, with the ends of the one-sided intervals at the corrected levels: ``lowest`` is above -margin
            where all benchmarks pass, ``highest`` below it where this one fails.
        more_samples: of all benchmarks that ``why`` names that would decide, if differences stay as they are (80 %
            power).
        prefill, first_token (of servers), decode, end_to_end: time over the baseline's, geometric mean over benchmarks,
            where measured.
        kv: measured share of the visual tokens in the KV cache. kv_bytes_saved: of one prompt, by the decoder's sizes.
        flops, layers: measured shares of the prefill's FLOPs and of visual tokens over layers.
        requests_per_hour: of one device, where a bench was joined (`Costs.best`).
        timed_samples: behind the times, of the benchmark that has fewest.
        again_difference, again_answers_changed, again_settings: noise floor on ``benchmark`` (`NoiseFloor`), in percent
            of the scale.
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
    highest: float
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
    timed_samples: int = 0
    again_difference: float = math.nan
    again_answers_changed: int | None = None
    again_settings: str = ""

    @property
    def noise_floor(self) -> NoiseFloor:
        """The three of them."""
        return NoiseFloor(self.again_settings, self.again_difference, self.again_answers_changed)


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
            "A/A %": [floor_text(one.noise_floor, 2) for one in some],
            "time: prefill": [_share(one.prefill) for one in some],
            "first token": [_share(one.first_token) for one in some],
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
        lines += [f"{FLOOR} Of the benchmark that is named first."] if any(columns.get("A/A %", ())) else []
        costs = [] if self.costs is None else ["", self.costs.to_terminal(width)]
        return "\n".join([*lines, *self.notes, *(f"Not compared: {line}" for line in self.left_out), *costs])


def decide(
    results_csv: str | Path,
    policy: Policy,
    baseline_csv: str | Path | None = None,
    *,
    force: bool = False,
    method: str | None = None,
    ratio: float | None = None,
    resamples: int = 10_000,
    bench: Sequence[Path] = (),
) -> Decision:
    """Apply a policy to every variant of a results CSV, on the headline metric of each benchmark.

    Args:
        method, ratio: only of these anything is said. All variants count in the correction nevertheless: a rule that
            was stated before must not depend on what is looked at after.
        bench: CSV files of costs; by default the one beside the results (`costs.join`).

    Raises:
        As `compare` and `costs.join`; ValueError: a critical benchmark, method or ratio that the results do not have.
    """
    rows = read_results(results_csv)
    there = sorted({row["benchmark"] for row in rows})
    for name in policy.critical:
        if name not in there:
            raise unknown("critical benchmark", name, there)

    def selected(row: Row) -> bool:
        return row["metric"] == headline(row) and row["method"] not in (BASELINE, AGAIN)

    comparison = compare(results_csv, baseline_csv, force=force, resamples=resamples, select=selected).limits_named()
    groups: dict[str, dict[tuple[str, str, int | None], list[ComparedRow]]] = {}
    for row in comparison.rows:
        groups.setdefault(row.model, {}).setdefault((row.variant, row.baseline_source, row.limit), []).append(row)
    folder = Path(results_csv).parent
    costs = join(comparison.rows, Path(results_csv), rows, bench)
    known = {variant_key(row): row for row in reversed(rows)}
    verdicts = []
    for of in groups.values():
        # Without critical benchmarks all that any variant of the model has: none passes by having fewer.
        needed = policy.critical or tuple(dict.fromkeys(row.benchmark for own_rows in of.values() for row in own_rows))
        own = [_Candidate(variant, own_rows, policy, needed) for (variant, *_), own_rows in of.items()]
        hypotheses = [p for one in own for p in one.p_worse]
        go, no_go = stats.holm([one.p_go for one in own]), iter(stats.holm(hypotheses).tolist())
        for one, p in zip(own, go.tolist(), strict=True):
            corrected = Corrected(p, [next(no_go) for _ in one.p_worse], len(own), len(hypotheses))
            if method not in (None, one.rows[0].method) or ratio not in (None, one.rows[0].ratio_asked):
                continue
            verdict = one.verdict(corrected, folder, known)
            if best := costs and costs.best(verdict.model, verdict.variant):
                verdict = replace(verdict, requests_per_hour=best.bench.requests_per_hour)
            verdicts.append(verdict)
    if not verdicts:
        raise ValueError(_none_of(method, ratio, comparison.rows))
    shown = comparison.of(method, ratio)
    return Decision(
        policy,
        tuple(verdicts),
        _cheapest(verdicts),
        shown.left_out,
        str(results_csv),
        _notes(shown, policy),
        costs and costs.of({(row.model, row.variant) for row in shown.rows}),
    )


def _notes(comparison: Comparison, policy: Policy) -> tuple[str, ...]:
    notes = [f"FORCED although settings differ: {line}" for line in comparison.forced]
    agreed = dict.fromkeys(row.metric for row in comparison.rows if row.metric in agreement.METRICS)
    notes += [f"{', '.join(agreed)}: {agreement.NOTE}."] if agreed else []
    floors = {
        f"{row.model} {row.benchmark}": 100 * abs(row.noise_floor.difference) / row.score_scale
        for row in comparison.rows
        if not policy.critical or row.benchmark in policy.critical
    }
    notes += [
        f"{place}: the unpruned model's second answers differ by {floor:.2f} % from its first, no less than the margin."
        for place, floor in floors.items()
        if floor >= policy.margin
    ]
    notes += time_lost(comparison.rows)
    return (*notes, *(["RANDOM WEIGHTS: nothing is decided."] if comparison.meaningless else []))


def _none_of(method: str | None, ratio: float | None, rows: Sequence[ComparedRow]) -> str:
    request = " ".join(str(part) for part in (method, ratio) if part is not None)
    there = ", ".join(dict.fromkeys(row.variant for row in rows))
    return f"no variant is {request}; the results have {there}" if rows else "the results have no variant to decide on"


@dataclass(frozen=True)
class Corrected:
    """What correction makes of a variant's p-values.

    Attributes:
        go: that all benchmarks pass. no_go: per benchmark, that it fails.
        variants, hypotheses: over how many the two were corrected.
    """

    go: float
    no_go: Sequence[float]
    variants: int
    hypotheses: int


class _Candidate:
    """A variant before correction over variants."""

    def __init__(self, variant: str, rows: Sequence[ComparedRow], policy: Policy, needed: Sequence[str]) -> None:
        self.variant, self.rows, self.policy = variant, rows, policy
        self.deciding = [row for row in rows if row.benchmark in needed]
        self.tests = {row.benchmark: row.loss_test(policy.margin) for row in self.deciding}
        self.missing = [name for name in needed if name not in self.tests]

    @property
    def obstacle(self) -> str:
        """What forbids any decision, in words."""
        if self.missing:
            return f"no row of {', '.join(self.missing)}"
        if not all(row.trained_weights for row in self.deciding):
            return "random weights"
        least = self.policy.minimum_n
        if few := [row for row in self.deciding if (row.n_samples or 0) < least]:
            missing = ", ".join(f"{row.benchmark} ({least - (row.n_samples or 0)} more needed)" for row in few)
            return f"fewer than {least} samples of {missing}"
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

    def verdict(self, corrected: Corrected, folder: Path, rows: Mapping[tuple[Any, ...], Row]) -> Verdict:
        """With the corrected p-values; ``rows`` by `variant_key`, the first of each."""
        alpha, p_go, p_no_go = self.policy.alpha, corrected.go, min(corrected.no_go, default=math.nan)
        word: Word = "GO" if p_go <= alpha else "NO-GO" if p_no_go <= alpha else "UNDECIDED"
        tested = [
            (row, test, p)
            for row, p in zip(self.deciding, corrected.no_go, strict=True)
            if (test := self.tests[row.benchmark])
        ]
        losing = any(test.difference < -row.margin(self.policy.margin) for row, test, _ in tested)
        row, why = self.rows[0], self.obstacle
        difference = lowest = highest = more = math.nan
        if tested:
            failing = word == "NO-GO" or (word == "UNDECIDED" and losing)
            row, test, p_fails = min(tested, key=lambda one: one[1].p_worse if failing else -one[1].p_not_worse)
            unit = 100 / row.score_scale
            difference = unit * row.difference
            # Where something forbids a decision, nothing is corrected: the plain interval is shown.
            passes, fails = (test.p_not_worse, test.p_worse) if self.obstacle else (p_go, p_fails)
            lowest = unit * test.lowest(_level(alpha, test.p_not_worse, passes))
            highest = unit * test.highest(_level(alpha, test.p_worse, fails))
            bound = (
                f"at most {highest:+.2f} %, p {fails:.2g}" if failing else f"at least {lowest:+.2f} %, p {passes:.2g}"
            )
            said = f"{row.benchmark} {difference:+.2f} %, {bound}"
            why = f"{why}; {said}" if why else said
            if word == "UNDECIDED" and not self.obstacle:
                needed = self._more(corrected, failing)
                more = sum(needed.values())
                if math.isfinite(more):
                    names = " and ".join(f"{math.ceil(count)} more of {name}" for name, count in needed.items())
                    why += f"; about {names} would make it {'NO-GO' if failing else 'GO'}"
        again = row.noise_floor if tested and row.again else None
        saved = [_kv_bytes_saved(row, folder, rows.get(variant_key(row))) for row in self.rows]
        return Verdict(
            model=self.rows[0].model,
            variant=self.variant,
            word=word,
            why=why,
            p_go=p_go,
            p_no_go=p_no_go,
            benchmark=row.benchmark if tested else "",
            difference=difference,
            lowest=lowest,
            highest=highest,
            more_samples=more,
            **{stage: _geometric([r.times[stage].ratio for r in self.rows]) for stage in STAGES},
            kv=_mean([r.ratio_kv_cache for r in self.rows]),
            kv_bytes_saved=_mean(saved),
            flops=_mean([r.ratio_flops for r in self.rows]),
            layers=_mean([r.ratio_layer_mean for r in self.rows]),
            timed_samples=min(max(time.n for time in r.times.values()) for r in self.rows),
            again_difference=100 * again.difference / row.score_scale if again else math.nan,
            again_answers_changed=again.answers_changed if again else None,
            again_settings=again.settings if again else "",
        )

    def _more(self, corrected: Corrected, failing: bool) -> dict[str, float]:
        """Benchmark -> how many more samples of each that does not pass yet; or of the one that fails soonest."""
        level = self.policy.alpha / (corrected.hypotheses if failing else corrected.variants)
        more = {}
        for row in self.deciding:
            if (test := self.tests[row.benchmark]) and (failing or test.p_not_worse > level):
                margin = row.margin(self.policy.margin)
                needed = clusters_to_decide(row.difference, test.error, test.n_clusters, margin, level)
                if not failing or row.difference < -margin:
                    more[row.benchmark] = max(1.0, (needed / test.n_clusters - 1) * (row.n_samples or test.n_clusters))
        return dict([min(more.items(), key=itemgetter(1))]) if failing else more


def _level(alpha: float, p_value: float, corrected: float) -> float:
    """At which an uncorrected test says the same as the corrected p-value at ``alpha``."""
    return alpha * p_value / corrected if corrected > 0 else alpha


def _cheapest(verdicts: Sequence[Verdict]) -> dict[str, tuple[str, str]]:
    """Per model the passing variant of least cost, by the first measure that all that pass have."""
    measures = {"requests_per_hour": "requests per hour of one device, measured by the bench"}
    measures |= {"end_to_end": "measured time end to end", "prefill": "measured time of the prefill"}
    measures |= {"flops": "measured FLOPs of the prefill", "layers": "measured tokens, mean over layers"}
    cheapest = {}
    for model in dict.fromkeys(one.model for one in verdicts):
        passing = [one for one in verdicts if one.model == model and one.word == "GO"]
        timed = min((one.timed_samples for one in passing), default=0) >= LEAST_TIMED
        for name, words in measures.items():
            if name in STAGES and not timed:
                continue
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


def _kv_bytes_saved(compared: ComparedRow, folder: Path, row: Row | None) -> float:
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
