"""The per-sample CSV of a cell: one row for each row of the benchmark, in its order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ivcp_eval.benchmarks import Benchmark
from ivcp_eval.interface.records import Answer, measured
from ivcp_eval.runs.answering.prompts import Prompts

if TYPE_CHECKING:
    from ivcp_eval.runs.answering.timing import Timed
    from ivcp_eval.vlmeval_bridge.evaluate import Scored

_COLUMNS = {name: said.column for name, said in measured().items() if said.column}
UNANSWERED = "no answer was made to this prompt"


def answers_by_index(indices: list[str], prompts: Prompts, answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """The answer to every row: a failure where its prompt could not be built, or nothing was answered.

    Args:
        indices: of the rows. answers: by the key of their prompt.
    """
    found = {}
    for index in indices:
        if index in prompts.broken:
            found[index] = Answer.from_json(prompts.broken[index])
        else:
            found[index] = answers.get(prompts.keys.get(index, "")) or Answer.failed(LookupError(UNANSWERED))
    return found


def sample_rows(
    benchmark: Benchmark,
    lines: list[dict[str, Any]],
    prompts: Prompts,
    answers: Mapping[str, Answer],
    scored: Scored,
    timed: Mapping[str, Timed] | None = None,
) -> list[dict[str, Any]]:
    """One record per line in the per-sample schema (`ivcp_eval.reports.schema`).

    Args:
        lines: of the data set, pictures left out. answers: by index, as `answers_by_index` gives them.
        timed: by index, of those samples that were timed.
    """
    rows = []
    for line in lines:
        index = str(line["index"])
        answer, times = answers[index], (timed or {}).get(index)
        cluster = prompts.pictures.get(index) if benchmark.cluster == "image" else line.get(benchmark.cluster)
        rows.append(
            {
                "index": index,
                "cluster": str(cluster or index),
                "category": str(line.get(benchmark.category, "")),
                "prompt_sha256": prompts.keys.get(index, ""),
                "answer": str(line.get("answer", "")),
                "score": scored.samples.get(index),
                "iou": scored.ious.get(index),
                "prefill_ms": times.own.prefill_ms if times else None,
                "decode_ms": times.own.decode_ms if times else None,
                **{column: getattr(answer, name) for name, column in _COLUMNS.items()},
            }
        )
    return rows
