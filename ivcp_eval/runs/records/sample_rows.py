"""Which answer belongs to which row of a benchmark, and what is known of each row but for its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.interface.records import Answer
from ivcp_eval.runs.answering.prompts import Prompts
from ivcp_eval.runs.records.scores import Sample, unread

if TYPE_CHECKING:
    from ivcp_eval.vlmeval_bridge.evaluate import Scored

UNANSWERED = "no answer was made to this prompt; try again with --retry-failed"


def answers_by_index(indices: list[str], prompts: Prompts, answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """The answer to every row: a failure where its prompt could not be built, or nothing was answered.

    Args:
        indices: of the rows. answers: by the key of their prompt.
    """
    by_index = {}
    for index in indices:
        if index in prompts.broken:
            by_index[index] = Answer.from_json(prompts.broken[index])
        else:
            by_index[index] = answers.get(prompts.keys.get(index, "")) or Answer.failed(LookupError(UNANSWERED))
    return by_index


def samples(benchmark: Benchmark, lines: list[dict[str, Any]], prompts: Prompts, scored: Scored) -> tuple[Sample, ...]:
    """One for each line of the data set, in its order (``lines``: pictures left out)."""
    rows = []
    for line in lines:
        index = str(line["index"])
        cluster = prompts.pictures.get(index) if benchmark.cluster == "image" else line.get(benchmark.cluster)
        rows.append(
            Sample(
                index=index,
                key=prompts.keys.get(index) or unread(index),
                cluster=str(cluster or index),
                category=str(line.get(benchmark.category, "")),
                answer=str(line.get("answer", "")),
                score=scored.samples.get(index),
                iou=scored.ious.get(index),
                similarity=scored.similarities.get(index),
            )
        )
    return tuple(rows)
