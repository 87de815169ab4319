"""One model on rows of one benchmark, answered under any conditions, with answers that survive a kill."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ivcp_eval import files
from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.failures import FAILURES, device_lost
from ivcp_eval.interface.records import Answer
from ivcp_eval.interface.registry import adapter, make_method
from ivcp_eval.interface.variants import BASELINE, text_of
from ivcp_eval.reports.stats import PairedResult, holm
from ivcp_eval.reports.terminal import fold
from ivcp_eval.runs.answering.prompts import Prompts
from ivcp_eval.runs.planning.cells import Cell
from ivcp_eval.runs.planning.plan import ModelPlan, RunPlan, make
from ivcp_eval.runs.planning.spec import check
from ivcp_eval.runs.records.sample_rows import samples
from ivcp_eval.runs.records.scores import Made, Sample
from ivcp_eval.runs.records.scoring import aside
from ivcp_eval.runs.store.journal import Journal
from ivcp_eval.vlmeval_bridge import register

if TYPE_CHECKING:
    from ivcp_eval.engine.fork import Ready
    from ivcp_eval.engine.run import Run
    from ivcp_eval.interface.variants import Variant
    from ivcp_eval.runs.answering.session import Parts, Session
    from ivcp_eval.vlmeval_bridge.evaluate import PromptRow, Scored

FOLDER = files.RESULTS / "analyses"
#: In a request, for the unpruned model alone.
NO_METHODS = ({"method": BASELINE, "ratios": [1.0]},)
Seen = Callable[[Mapping[str, "Run"]], None]


@dataclass(frozen=True)
class Question:
    """One row of the benchmark, as it is asked.

    Attributes:
        index: of the row. key: content hash of the prompt. parts: the conversation, as a `Session` takes it.
    """

    index: str
    key: str
    parts: Parts


@dataclass
class Study:
    """One model on one benchmark.

    Attributes:
        cells: of the variants that were asked for, the unpruned one first. dataset: VLMEvalKit's, with the rows that
            take part. folder: where answers are kept. tell: prints what is neither result nor error.
    """

    plan: RunPlan
    model: ModelPlan
    benchmark: Benchmark
    cells: tuple[Cell, ...]
    dataset: Any
    folder: Path
    tell: Callable[[str], None] = lambda text: None
    _journal: Journal | None = field(default=None, repr=False)
    _devices: set[str] = field(default_factory=set, repr=False)
    _checked: bool = False

    @classmethod
    def of(cls, request: Mapping[str, Any], folder: Path, tell: Callable[[str], None], dataset: Any = None) -> Study:
        """The study of a request, which is a sweep file's content with one model and one benchmark.

        Args:
            dataset: one that was read before; by default the benchmark's, up to the request's limit.

        Raises:
            ValueError: something is wrong with the request, or neither model nor data are here.
        """
        spec = check({"kind": "eval", "controls": [], **request}, "analysis")
        plan = make(spec, folder, fetch=tell)
        if not plan.models:
            raise ValueError("\n".join(plan.problems))
        (model,) = plan.models.values()
        ((benchmark, cells),) = model.groups.values()
        if benchmark.judge == "required":
            raise ValueError(f"{benchmark.name} is rated by a judge, and an analysis asks none; choose another one")
        register()
        if dataset is None:
            from ivcp_eval.vlmeval_bridge.evaluate import build

            dataset = build(benchmark, spec.options.limit)
        return cls(plan, model, benchmark, cells, dataset, folder, tell)

    @cached_property
    def session(self) -> Session:
        """The model in memory."""
        from ivcp_eval.runs.answering.session import Session

        options = self.plan.options
        return Session(
            self.model.weights, self.model.placement, self.model.limits, options.trust_remote_code, options.timeout
        )

    @property
    def baseline(self) -> Cell:
        """The cell of the unpruned model."""
        return next(cell for cell in self.cells if cell.identity.variant.method == BASELINE)

    @property
    def pruned(self) -> list[Cell]:
        """The cells of all other variants."""
        return [cell for cell in self.cells if cell.identity.variant.method != BASELINE]

    def digest(self, *settings: Any) -> str:
        """Of everything but the variants that can change an answer, ``settings`` and their code among it."""
        content = [named(self.baseline), *settings]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]

    @contextmanager
    def kept(self, name: str) -> Iterator[Journal]:
        """Keep answers in the file ``name``, and take those from it that are there."""
        with Journal(self.folder / "answers" / f"{name}.jsonl").open() as journal:
            if journal.damage:
                self.tell(str(journal.damage))
            self._journal = journal
            try:
                yield journal
            finally:
                self._journal = None

    def questions(self, rows: Any = None) -> list[Question]:
        """The prompts of the data set, or of ``rows``, a table like its own; rows that cannot be read are told of."""
        from ivcp_eval.vlmeval_bridge.reading import videos

        prompts = self._prompts if rows is None else self._read(rows)
        for row in prompts:
            if row.message is None:
                self.tell(f"{self.benchmark.name}, row {row.index} is left out: {row.failure['error']}")
        return [Question(row.index, row.key, videos.parts(row.message)) for row in prompts if row.message is not None]

    @cached_property
    def _prompts(self) -> list[PromptRow]:
        return self._read(self.dataset.data)

    def _read(self, rows: Any) -> list[PromptRow]:
        from ivcp_eval.vlmeval_bridge.evaluate import messages
        from ivcp_eval.vlmeval_bridge.model import Prompting

        with self._with_rows(rows):
            return list(messages(self.dataset, Prompting(adapter(self.model.weights.family))))

    def answers(
        self, question: Question, conditions: Mapping[str, Variant | Ready], seen: Seen | None = None
    ) -> dict[str, Answer]:
        """Answer a question under every condition in one pass; what the journal has is not answered again.

        Args:
            conditions: name, unique in the journal, -> what answers. seen: gets the facts of each prefill; answers
                from the journal and those made one by one after a failure have none.
        """
        assert self._journal is not None
        kept = {name: self._journal.records.get(f"{name} {question.key}") for name in conditions}
        lacking = {name: conditions[name] for name, answer in kept.items() if answer is None or not answer.is_settled}
        for name, (answer, run) in self._made(question, lacking).items() if lacking else ():
            self._journal.append(f"{name} {question.key}", answer)
            kept[name] = answer
            if seen and run is not None:
                seen({name: run})
        answers = {name: answer for name, answer in kept.items() if answer is not None}
        self._devices |= {answer.device for answer in answers.values() if answer.device}
        return answers

    def _made(
        self, question: Question, conditions: Mapping[str, Variant | Ready]
    ) -> dict[str, tuple[Answer, Run | None]]:
        """All together, or one by one where that fails, so that one condition cannot fail the others.

        Raises:
            ValueError: the model cannot run one of the study's variants at all.
        """
        self._check()
        grounding = self.benchmark.kind == "grounding"
        shrinking = [name for name, condition in conditions.items() if _shrinks(condition)]
        if shrinking and len(conditions) > 1:  # each encodes a picture of its own
            rest = {name: condition for name, condition in conditions.items() if name not in shrinking}
            parts = [{name: conditions[name]} for name in shrinking] + [rest] * bool(rest)
            return {name: new for part in parts for name, new in self._made(question, part).items()}
        try:
            if shrinking:
                ((name, variant),) = conditions.items()
                return {name: (self.session.answer(question.parts, cast("Variant", variant), grounding), None)}
            new = self.session.answer_and_runs(question.parts, list(conditions.values()), grounding)
            return dict(zip(conditions, new, strict=True))
        except Unsupported:
            raise
        except FAILURES as error:
            if device_lost(self.session.model):
                raise
            if len(conditions) == 1:
                return {name: (Answer.failed(error), None) for name in conditions}
        alone = [self._made(question, {name: condition}) for name, condition in conditions.items()]
        return {name: answer for one in alone for name, answer in one.items()}

    def _check(self) -> None:
        """Refuse, before anything is answered, variants that would fail on every question."""
        if not self._checked:
            for cell in self.pruned:
                try:
                    self.session.check(cell.identity.variant)
                except ValueError as error:
                    raise ValueError(f"{label(cell.identity.variant)} cannot run on this model: {error}") from error
            self._checked = True

    def scored(self, answers: Mapping[str, Answer]) -> Scored:
        """VLMEvalKit's evaluation of the rows with these indices; a failed answer counts as wrong."""
        from ivcp_eval.vlmeval_bridge import evaluate as bridge

        data = self.dataset.data
        rows = data[data["index"].astype(str).isin(answers.keys())]
        with self._with_rows(rows), aside(self.folder), tempfile.TemporaryDirectory() as work:
            given = {index: answer.scored for index, answer in answers.items()}
            predictions = bridge.stored(self.dataset, given, Path(work))
            return bridge.score(self.benchmark, self.dataset, predictions)

    def samples(self, answers: Mapping[str, Answer]) -> dict[str, Sample]:
        """Index -> score, cluster and category of each row; only rows that have a score of their own.

        Raises:
            ValueError: the benchmark gives no sample a score of its own.
        """
        data = self.dataset.data
        rows = data[data["index"].astype(str).isin(answers.keys())].drop(columns="image", errors="ignore")
        every = samples(self.benchmark, rows.to_dict("records"), Prompts.of(self._prompts), self.scored(answers))
        scored = {sample.index: sample for sample in every if sample.score is not None}
        if not scored:
            raise ValueError(f"{self.benchmark.name} gives no sample a score of its own, so nothing can be paired")
        return scored

    @contextmanager
    def _with_rows(self, rows: Any) -> Iterator[None]:
        before, self.dataset.data = self.dataset.data, rows
        try:
            yield
        finally:
            self.dataset.data = before

    def provenance(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the numbers were made from, as JSON."""
        return {
            "made": asdict(Made.now("", timing=True)),
            "model": json.loads(self.baseline.identity.canonical),
            "variants": [json.loads(cell.identity.canonical) for cell in self.pruned],
            "settings": dict(settings),
            "devices": sorted(self._devices),
        }


def _shrinks(condition: Variant | Ready) -> bool:
    """Whether a variant's method makes the picture smaller, so that it shares nothing with others."""
    if not isinstance(condition.method, str):
        return False
    return make_method(condition.method, condition.parameters).pixel_share(condition.ratio) is not None


def named(cell: Cell) -> str:
    """A cell's hash but for its limit: answers are kept by their prompt, so more rows cost no answer."""
    return replace(cell.identity, limit=None).hash


def label(variant: Variant) -> str:
    """As a table names it: the method, what was asked for, and parameters of the user's."""
    shown = {name: value for name, value in variant.parameters.items() if name not in variant.implied}
    kind = f" of {variant.budget.label}" if variant.budget else ""
    return " ".join([f"{variant.method} {variant.requested:g}{kind}", *(f"{k}={text_of(v)}" for k, v in shown.items())])


def compared(result: PairedResult | None, reference: str) -> dict[str, Any]:
    """The columns of a paired difference to ``reference``; without a result they are empty."""
    low, high = (result.difference_interval.low, result.difference_interval.high) if result else (None, None)
    return {
        "against": reference if result else "",
        "difference": result and result.difference,
        "difference_low": low,
        "difference_high": high,
        "p_value": result.p_value if result else math.nan,
    }


def with_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with ``p_holm``, their ``p_value`` after Holm's correction over all of them."""
    for row, p_holm in zip(rows, holm([row["p_value"] for row in rows]), strict=True):
        row["p_holm"] = float(p_holm)
    return rows


def text(rows: Sequence[Mapping[str, Any]], hidden: Sequence[str] = (), names: int = 1) -> str:
    """The table for a terminal, differences with their intervals.

    Args:
        hidden: columns that it leaves out. names: how many of the first columns name a row.
    """
    shown = [
        {
            **row,
            "difference": ""
            if row["difference"] is None
            else f"{row['difference']:+.1f} [{row['difference_low']:+.1f}, {row['difference_high']:+.1f}]",
        }
        for row in rows
    ]
    left = [name for name in rows[0] if name not in (*hidden, "difference_low", "difference_high", "p_value")]
    return fold({name: [_short(row[name]) for row in shown] for name in left}, left[:names])


def _short(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(path: Path, rows: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
    """The table as CSV at ``path``, and beside it, with the ending ``.json``, what it was made from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_write(path) as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    files.write_json(path.with_suffix(".json"), dict(provenance))


def cell(value: Any) -> Any:
    """As a CSV or a table has it: six digits, and nothing for what could not be computed."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return files.as_shown(value)
    return f"{value:.6g}" if isinstance(value, float) else value
