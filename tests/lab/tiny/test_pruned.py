"""The shipped model, unpruned and pruned, still scores what was recorded: a silent break of the engine shows here."""

from __future__ import annotations

import pytest

from ivcp_eval.files import PACKAGE
from ivcp_eval.interface import models
from ivcp_eval.interface.variants import Variant
from ivcp_eval.lab.tiny import tasks
from ivcp_eval.lab.tiny.evaluate import is_right, read_benchmark
from ivcp_eval.reports.table import read_results
from ivcp_eval.runs.answering.session import Session
from ivcp_eval.runs.planning.placement import Limits, Placement

#: Questions of each benchmark, and how far such a slice may stray from the recorded accuracy (percent).
SLICE, BAND = 60, 14.0


def _recorded(benchmark: str, variant: Variant) -> float:
    layer = f'"layer":{variant.parameters["layer"]}' if variant.parameters else ""
    for row in read_results(PACKAGE.parent / "results" / "tiny.csv"):
        same = (row["benchmark"], row["method"], row["ratio_asked"]) == (benchmark, variant.method, variant.ratio)
        if same and layer in row["method_parameters"] and '"ivc":0.0' not in row["method_parameters"]:
            return float(row["score"])
    raise AssertionError(f"results/tiny.csv has no row for {benchmark}, {variant}")


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["tiny_grounding", "tiny_short"])
def test_a_slice_stays_in_the_recorded_band(benchmark: str) -> None:
    weights = models.locate("tiny")
    session = Session(weights, Placement("cpu").resolve(), Limits.published(weights))
    tuned = weights.checkpoint.methods["ivc_prune"]
    variants = [Variant("tiny"), *(Variant("tiny", "ivc_prune", ratio, tuned) for ratio in (0.5, 0.25))]
    every = read_benchmark(PACKAGE.parent / "datasets" / f"{benchmark}.tsv")
    questions = every[:: len(every) // SLICE][:SLICE]
    hits = [0] * len(variants)
    for question in questions:
        parts = [{"image": question.image}, {"text": tasks.build_prompt(question.sample)}]
        for i, answer in enumerate(session.answer_all(parts, variants)):
            hits[i] += is_right(question.sample, answer.prediction)
    for variant, right in zip(variants, hits, strict=True):
        assert 100 * right / SLICE == pytest.approx(_recorded(benchmark, variant), abs=BAND), variant
    assert hits[0] > hits[2], "pruning to a quarter costs this model many points; if it costs none, nothing was pruned"
