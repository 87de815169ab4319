"""What is asked, and of which file: wording, images, checksums, test sets that are not whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ivcp_eval import benchmarks, files, vlmeval_bridge
from ivcp_eval.files import file_digest
from ivcp_eval.interface.variants import Variant
from tests.vlmeval_bridge.conftest import Laboratory, RecordingSession
from tests.vlmeval_bridge.miniatures import GROUNDING, miniatures
from tests.vlmeval_bridge.test_matrix import NAMES

BASELINE, PRUNED = Variant("tiny"), Variant("tiny", "ivc_prune", 0.5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_baseline_and_pruned_get_the_identical_prompt(laboratory: Laboratory, tmp_path: Path, name: str, family: str):
    from ivcp_eval.vlmeval_bridge import evaluate as bridge

    dataset = laboratory.dataset(name)
    sent = []
    for variant in (BASELINE, PRUNED):
        session = RecordingSession(family=family)
        bridge.infer(dataset, laboratory.model(session, variant), tmp_path, {})
        sent.append(session.sent)
    assert len(sent[0]) == len(dataset.data) > 0
    assert sent[0] == sent[1]
    assert all(any(part["type"] == "image" for part in json.loads(message)) for _, message in sent[0])


# Where we send the set's own wording and VLMEvalKit's Qwen adapter would send Qwen's: said in the files' notes.
OWN_WORDING = {"CV-Bench-2D", "CV-Bench-3D", "LLaVABench", "easy_vqa"}
# Files that VLMEvalKit does not know and cannot fetch.
CONVERTED = {*GROUNDING, "easy_vqa"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in GROUNDING])
def test_qwen_is_asked_as_by_vlmevalkits_own_adapter(laboratory: Laboratory, name: str):
    from vlmeval.vlm.qwen2_vl.prompt import Qwen2VLPromptMixin

    dataset = laboratory.dataset(name)
    theirs = Qwen2VLPromptMixin()
    theirs.set_dump_image(dataset.dump_image)
    ours = laboratory.model(RecordingSession())
    ours.set_dump_image(dataset.dump_image)
    assert ours.use_custom_prompt(name) == (theirs.use_custom_prompt(name) and name not in OWN_WORDING)
    if ours.use_custom_prompt(name):
        for _, line in dataset.data.iterrows():
            assert ours.build_prompt(line, name) == theirs.build_prompt(line, name)


@pytest.mark.parametrize("name", GROUNDING)
def test_expressions_are_stripped_and_boxes_asked_for(laboratory: Laboratory, name: str):
    from vlmeval.dataset import DATASET_TYPE, SUPPORTED_DATASETS

    dataset = laboratory.dataset(name)
    assert (type(dataset).__name__, DATASET_TYPE(name)) == ("Grounding", "GROUNDING")
    assert SUPPORTED_DATASETS.count(name) == 1
    assert list(dataset.data["question"]) == [f"thing {i} on the left" for i in range(4)]
    assert "thing 2 on the left as" in dataset.build_prompt(dataset.data.iloc[2])[-1]["value"]
    model = laboratory.model(RecordingSession())
    model.set_dump_image(dataset.dump_image)
    assert "Locate thing 2 on the left and" in model.build_prompt(dataset.data.iloc[2], name)[-1]["value"]


def test_samples_of_one_picture_are_one_cluster(laboratory: Laboratory):
    _, rows = laboratory.score("POPE", miniatures()["POPE"].right)
    assert len({row["cluster"] for row in rows}) == 1
    _, rows = laboratory.score("RefCOCO_val", miniatures()["RefCOCO_val"].right)
    assert len({row["cluster"] for row in rows}) == 3
    _, rows = laboratory.score("MMBench_DEV_EN_V11", miniatures()["MMBench_DEV_EN_V11"].right)
    assert len({row["cluster"] for row in rows}) == 4


def test_answers_without_a_box_are_counted(laboratory: Laboratory):
    scored, _ = laboratory.score("RefCOCO_val", miniatures()["RefCOCO_val"].half)
    assert scored.remark == "1 of 4 answers hold no box and count as misses"


def test_a_test_set_that_is_not_whole_is_named(laboratory: Laboratory):
    from ivcp_eval.vlmeval_bridge.evaluate import data_problem

    def remark() -> str:
        return laboratory.score(benchmark.name, miniatures()[benchmark.name].right)[0].remark

    benchmark = benchmarks.load("RefCOCO_testA")
    laboratory.dataset(benchmark.name)
    path = laboratory.root / "RefCOCO_testA.tsv"
    report_path = path.with_name("RefCOCO_testA.tsv.report.json")
    report = {"bytes": path.stat().st_size, "rows": 4, "expected_rows": 5657, "skipped": 3, "complete": False}
    assert data_problem(benchmark) == remark() == ""
    try:
        report_path.write_text(json.dumps(report))
        assert data_problem(benchmark) == ""
        assert "4 of 5657 expressions, 3 skipped" in remark()
        assert "4 of 5657 expressions" in benchmarks.notices(benchmark, path, None)[0]
        report_path.write_text(json.dumps({**report, "complete": True}))
        assert data_problem(benchmark) == remark() == ""
        report_path.write_text(json.dumps({**report, "complete": True, "bytes": 1}))
        assert "not the report of" in data_problem(benchmark)
    finally:
        report_path.unlink()


def test_an_evaluator_that_fails_is_a_missing_score(laboratory: Laboratory):
    """MM-Vet's divides by the number of samples of each ability: zero in a run cut by --limit."""
    from ivcp_eval.vlmeval_bridge import evaluate as bridge
    from ivcp_eval.vlmeval_bridge.reading import answers
    from ivcp_eval.vlmeval_bridge.scores import ScoreMissing

    dataset, _, predictions = laboratory.infer("POPE", miniatures()["POPE"].right)
    answers.write(answers.read(predictions).drop(columns="answer"), predictions.with_suffix(""))
    with pytest.raises(ScoreMissing, match="POPE failed: KeyError"):
        bridge.score(benchmarks.load("POPE"), dataset, predictions, None)


def test_a_set_that_needs_a_judge_is_not_scored_without(laboratory: Laboratory):
    from ivcp_eval.vlmeval_bridge.scores import ScoreMissing

    for name in ("MMVet", "LLaVABench", "MathVista_MINI"):
        with pytest.raises(ScoreMissing, match=r"rated by a judge.*JUDGE=gpt-4o"):
            laboratory.score(name, miniatures()[name].right)


def test_addresses_and_checksums_are_vlmevalkits(laboratory: Laboratory):
    import vlmeval.dataset

    for name in set(NAMES) - CONVERTED:
        benchmark = benchmarks.load(name)
        owner = next(c for c in vlmeval.dataset.DATASET_CLASSES if name in c.supported_datasets())
        assert owner.DATASET_URL[name] == benchmark.url
        assert benchmarks.load.__wrapped__(name).md5 == laboratory.checksums[name]


@pytest.mark.parametrize(
    "name", [name for name in benchmarks.names() if benchmarks.load(name).group != "own" and benchmarks.load(name).file]
)
def test_files_of_our_own_are_whole(name: str):
    from ivcp_eval.vlmeval_bridge.datasets import read_tsv

    benchmark = benchmarks.load(name)
    assert benchmark.path is not None
    assert benchmark.kind is not None
    table = read_tsv(benchmark.path, benchmark.kind)
    assert benchmark.n_samples in (None, len(table))
    assert benchmark.sha256 in ("", file_digest(benchmark.path))
    columns = {benchmark.cluster, benchmark.category} - {"", "image", "category"}
    assert columns <= set(table), "statistics would silently take every row for itself"


@pytest.mark.parametrize("name", NAMES)
def test_files_say_what_a_reader_needs(name: str):
    benchmark = benchmarks.load(name)
    needed = ("title", "source", "licence", "note", "abilities", "n_samples", "metrics", "samples", "cluster")
    for wanted in needed:
        assert getattr(benchmark, wanted), wanted
    assert bool(benchmark.url) != (name in CONVERTED)


def test_vlmevalkit_is_asked_once_whether_it_has_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    from vlmeval.dataset import ImageMCQDataset

    found = vlmeval_bridge.knows("CCBench"), vlmeval_bridge.expected_md5("CCBench"), vlmeval_bridge.knows("CCBunch")
    assert found == (True, ImageMCQDataset.DATASET_MD5["CCBench"], False)
    monkeypatch.setattr(vlmeval_bridge, "_ask_vlmeval", lambda name: pytest.fail(f"imported again for {name}"))
    again = vlmeval_bridge.knows("CCBench"), vlmeval_bridge.expected_md5("CCBench"), vlmeval_bridge.knows("CCBunch")
    assert again == found
