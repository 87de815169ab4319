"""One cell through VLMEvalKit: its `build_dataset`, its prompts, its inference loop, its `evaluate`.

VLMEvalKit writes into a folder made for this cell and emptied first, since its caches are keyed by sample index alone
and would hand one run's verdicts to another.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from vlmeval.dataset.image_vqa import MMVet
from vlmeval.dataset.video_base import VideoBaseDataset
from vlmeval.inference import infer_data_job

from ivcp_eval.benchmarks import Benchmark, DataMissing, Samples, clips, without_pair
from ivcp_eval.benchmarks.agreement import NOTE, agreement
from ivcp_eval.benchmarks.refcoco.partial import PARTIAL, not_whole
from ivcp_eval.benchmarks.thinking import END, split_thinking
from ivcp_eval.files import DiskFullError, NoLocksError
from ivcp_eval.interface.failures import FAILURES, contained, failure
from ivcp_eval.interface.registry import unknown
from ivcp_eval.vlmeval_bridge import judging, scores
from ivcp_eval.vlmeval_bridge.datasets import CLASSES, image_key, message_key
from ivcp_eval.vlmeval_bridge.environment import data_root, lossless_files
from ivcp_eval.vlmeval_bridge.judge import Judge
from ivcp_eval.vlmeval_bridge.model import BridgedVLM, Message, Prompting
from ivcp_eval.vlmeval_bridge.reading import answers, stock, videos
from ivcp_eval.vlmeval_bridge.reading.pictures import alone, unpacked
from ivcp_eval.vlmeval_bridge.sample_scores import RULES
from ivcp_eval.vlmeval_bridge.scores import ScoreMissing


def build(benchmark: Benchmark, limit: int | None) -> Any:
    """VLMEvalKit's data set object, cut to its first ``limit`` rows that can be scored (`benchmarks.notices` says so).

    Raises:
        DataMissing: no file here and no download possible. ValueError: a file that VLMEvalKit cannot read.
    """
    path = benchmark.path or data_root() / f"{benchmark.vlmeval}.tsv"
    here = path.is_file()
    try:
        with contained("VLMEvalKit"):
            dataset = stock.build(benchmark.vlmeval, benchmark.frames)
    except (ValueError, DataMissing):
        raise
    except Exception as error:  # a failed download is a bare Exception there
        if here:
            raise ValueError(
                f"VLMEvalKit cannot read {path} ({type(error).__name__}: {error}). Look for cells that are empty or "
                "cut off (image, index), or get the file again: `ivcp data`"
            ) from error
        dataset, reason = None, f"{type(error).__name__}: {error}"
    else:
        reason = "VLMEvalKit does not know it, and no such TSV is in its data root"
    if dataset is None:
        raise DataMissing(
            f"benchmark {benchmark.name!r}: the data is not here and could not be fetched ({reason}). "
            f"Put {benchmark.vlmeval}.tsv into {data_root()} (set LMUData to use another folder), or see `ivcp data`. "
            f"{benchmark.source}"
        )
    if isinstance(dataset, CLASSES):
        dataset.adds_videos, dataset.frames = True, benchmark.frames  # see `messages`
    if limit is not None:
        cut = dataset.data.iloc[:limit]
        alone = without_pair(benchmark.vlmeval, {str(column): list(cut[column]) for column in cut})
        dataset.data = cut[[not out for out in alone]]
    return dataset


@dataclass(frozen=True)
class PromptRow:
    """The prompt of one row.

    Attributes:
        index: of the row. message: None if it cannot be built; then ``failure`` says why (`failures.failure`).
        key: content hash of the message. pictures: that of its images alone.
    """

    index: str
    message: Message | None = None
    key: str = ""
    pictures: str = ""
    failure: Mapping[str, str] = field(default_factory=dict)


def messages(dataset: Any, prompting: Prompting, start: int = 0, stop: int | None = None) -> Iterator[PromptRow]:
    """The prompts of the rows ``start`` to ``stop``, as VLMEvalKit's loop will build them."""
    kind = None if getattr(dataset, "force_use_dataset_prompt", False) else prompting.kind(dataset.dataset_name)
    for i in range(*slice(start, stop).indices(len(dataset.data))):
        line = dataset.data.iloc[i]
        build = partial(prompting.message, line, kind, dataset.dump_image) if kind else None
        if isinstance(dataset, VideoBaseDataset):
            build = partial(dataset.build_prompt, line, video_llm=True)
        try:
            with alone(dataset), contained("VLMEvalKit"):
                message = unpacked(build or partial(dataset.build_prompt, line), again="image" in dataset.data)
                if isinstance(dataset, VideoBaseDataset):
                    message = videos.of_file(message, clips.Sampling(dataset.nframe, max(0, dataset.fps)))
                elif isinstance(dataset, CLASSES):
                    message = videos.shown(line, message, dataset.frames)
            key, pictures = message_key(message), image_key(message)
        except (DiskFullError, NoLocksError):
            raise
        except FAILURES as error:
            yield PromptRow(str(line["index"]), failure=failure(error))
        else:
            yield PromptRow(str(line["index"]), message, key, pictures)


def infer(dataset: Any, model: BridgedVLM, folder: Path, broken: Collection[str]) -> Path:
    """VLMEvalKit's inference loop over the rows that have a prompt; the other rows join with an empty answer.

    Returns:
        The prediction file (`answers.write`) with every row, so that a broken row counts as wrong and is never dropped.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole = dataset.data
    dataset.data = whole[~whole["index"].astype(str).isin(broken)].copy()
    name = model.name
    try:
        with lossless_files(), torch.inference_mode():
            infer_data_job(model, str(folder), name, dataset)
        given = dict(zip(dataset.data["index"].astype(str), dataset.data["prediction"], strict=True))
    finally:
        dataset.data = whole
    return _written(dataset, given, folder / f"{name}_{dataset.dataset_name}")


def stored(dataset: Any, given: Mapping[str, str], folder: Path) -> Path:
    """A prediction file as `infer` leaves it, from answers that were kept (index -> answer)."""
    return _written(dataset, given, folder / f"stored_{dataset.dataset_name}")


def _written(dataset: Any, given: Mapping[str, str], path: Path) -> Path:
    table = dataset.data.drop(columns="image", errors="ignore").copy()
    table["prediction"] = [given.get(str(index), "") for index in table["index"]]
    return answers.write(table, path)


@dataclass(frozen=True)
class Scored:
    """What an evaluation left.

    Attributes:
        metrics: name -> (score, scale). samples: index -> score in 0..1; without an entry: not scored alone.
        judge_failures: answers that the judge could not rate, which are left out of the score; None if none was asked.
        remark: what else should be known, in words.
        ious: grounding: index -> overlap of the box with the true one, or, of agreement, with the unpruned model's.
        similarities: of agreement: index -> likeness of the text to the unpruned model's.
        thinking: answers of which only what follows ``</think>`` was scored.
    """

    metrics: dict[str, tuple[float, float]]
    samples: dict[str, float]
    judge_failures: int | None = None
    remark: str = ""
    ious: Mapping[str, float] = field(default_factory=dict)
    similarities: Mapping[str, float] = field(default_factory=dict)
    thinking: int = 0


def score(benchmark: Benchmark, dataset: Any, predictions: Path, judge: Judge | None = None) -> Scored:
    """VLMEvalKit's own evaluation, and the numbers it left.

    VLMEvalKit's judge is never asked: what has to be judged is rated by ours first (see `judging`), and VLMEvalKit
    then evaluates by exact matching or from the finished ratings. For an undeclared data set every number of the
    returned table is a metric on an unknown scale of 100.

    Raises:
        ScoreMissing: the evaluator failed or left no number, or the benchmark needs a judge and has none.
        JudgeError: the judge cannot be reached, refuses or does not make sense.
    """
    unrated: list[str] | None = None
    evaluator = "exact_matching"
    if benchmark.reference == "baseline":
        raise ScoreMissing(f"{benchmark.name} has no answers; only `ivcp eval` and sweeps measure agreement (`agreed`)")
    if benchmark.judge == "required":
        evaluator = "judged"
        if judge is None:
            raise ScoreMissing(
                f"{benchmark.name} is rated by a judge, which exact matching cannot replace; name one (JUDGE=gpt-4o)"
            )
    thinking = answers.split_thinking(predictions) if benchmark.thinking == "split" else 0
    if isinstance(dataset, VideoBaseDataset):  # whose evaluators refuse pickled tables
        predictions = answers.as_text(predictions)
    with lossless_files():
        if judge is not None and benchmark.judge != "none":
            predictions, unrated = judging.rate(benchmark, dataset, predictions, judge, evaluator)
        try:
            with contained("it"):
                returned = dataset.evaluate(str(predictions), model=evaluator)
        except OSError:  # a full disk, for one, is nothing of the evaluator's
            raise
        except ZeroDivisionError as error:  # MM-Vet's, over the number of samples of each ability
            if not isinstance(dataset, MMVet):
                raise ScoreMissing(f"VLMEvalKit's evaluator of {benchmark.vlmeval} failed: {error!r}") from error
            returned = judging.mmvet_total(predictions, evaluator)
        except Exception as error:  # evaluators fail in every way: packages that are not here, tables they cannot read
            raise ScoreMissing(f"VLMEvalKit's evaluator of {benchmark.vlmeval} failed: {error!r}") from error
    metrics = scores.read_metrics(benchmark, predictions.parent, predictions.stem, evaluator)
    samples = _samples(benchmark, dataset, predictions, evaluator)
    left_out = set(unrated or ())
    return Scored(
        metrics or scores.all_numbers(returned),
        {index: value for index, value in samples.items() if index not in left_out},
        None if unrated is None else len(unrated),
        _remark(benchmark, predictions, unrated or (), thinking),
        _ious(benchmark, predictions),
        thinking=thinking,
    )


def agreed(benchmark: Benchmark, given: Mapping[str, str], reference: Mapping[str, str]) -> Scored:
    """How far answers agree with those of the unpruned model (index -> answer; failed ones are left out)."""
    thought = sum(END in text for text in given.values())
    if benchmark.thinking == "split":
        given, reference = (
            {index: split_thinking(text)[0] for index, text in answers.items()} for answers in (given, reference)
        )
    result = agreement(given, reference, benchmark.kind == "grounding")
    return Scored(
        {name: (value, 100.0) for name, value in result.metrics.items()}, result.samples, remark=NOTE, ious=result.ious,
        similarities=result.similarities, thinking=thought if benchmark.thinking == "split" else 0,
    )  # fmt: skip


def _samples(benchmark: Benchmark, dataset: Any, predictions: Path, evaluator: str) -> dict[str, float]:
    if benchmark.samples is None:
        return {}
    if not benchmark.samples.rule:
        return scores.read_samples(benchmark.samples, predictions.parent, predictions.stem, evaluator)
    if benchmark.samples.rule not in RULES:
        raise unknown("rule of per-sample scores", benchmark.samples.rule, RULES)
    return RULES[benchmark.samples.rule](dataset, predictions, evaluator)


def _ious(benchmark: Benchmark, predictions: Path) -> dict[str, float]:
    if benchmark.kind != "grounding":
        return {}
    return scores.read_samples(Samples("_results.csv", "iou"), predictions.parent, predictions.stem, "")


def _remark(benchmark: Benchmark, predictions: Path, unrated: Sequence[str], thinking: int) -> str:
    partial = not_whole(benchmark.path or data_root() / f"{benchmark.vlmeval}.tsv")
    remarks = [partial] if partial.startswith(PARTIAL) else []
    if unrated:
        remarks.append(f"the judge could not rate {len(unrated)} answers, which are left out")
    if thinking:
        remarks.append(f"of {thinking} answers only what follows </think> was scored")
    if benchmark.kind == "grounding":
        table = scores.read_table(predictions.parent, predictions.stem, "_acc.csv")
        boxless, n = int(table["unparsable"].iloc[0]), int(table["n"].iloc[0])
        if boxless:
            remarks.append(f"{boxless} of {n} answers hold no box and count as misses")
    return "; ".join(remarks)


def data_problem(benchmark: Benchmark) -> str:
    """Why the benchmark's file is not what its converter reported; empty if it is, a partial one being a remark."""
    problem = not_whole(benchmark.path or data_root() / f"{benchmark.vlmeval}.tsv")
    return "" if problem.startswith(PARTIAL) else problem
