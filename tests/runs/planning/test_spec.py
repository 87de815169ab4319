"""Sweep files: what they expand to, and errors that name the line."""

from __future__ import annotations

import argparse
import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ivcp_eval import benchmarks
from ivcp_eval.cli.running import eval as command
from ivcp_eval.lab.bench.scaling import of_videos
from ivcp_eval.runs.planning.options import Options
from ivcp_eval.runs.planning.plan import judge_config
from ivcp_eval.runs.planning.spec import SpecError, check, load
from tests.methods.test_published_settings import KNOWN

ROOT = Path(__file__).parents[3] / "sweeps"
GOOD = """\
models: [qwen25, llava15]
benchmarks: [POPE, MMStar]
methods:
  - method: ivc_prune
    ratios: [0.5, 0.25]
    parameters: {layer: [14, 16], ivc: 0.1}
  - method: random
    ratios: [0.5]
    seeds: [0, 1]
    models: [qwen25]
    benchmarks: [POPE]
exclude:
  - {model: llava15, ratio: 0.25}
controls: []
limit: 10
"""
CLIPS = GOOD.replace("POPE, MMStar", "tiny_clips").replace("POPE", "tiny_clips")


def write(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text)
    return path


def test_a_file_that_is_not_there_is_refused_with_what_there_is(tmp_path: Path) -> None:
    for path in (tmp_path / "smok.yaml", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is no sweep file; .* paper, ratios, smoke"):
            load(path)


def test_options_of_the_judge_come_from_a_file_and_from_the_command_line(tmp_path: Path) -> None:
    asked = {"max_completion_tokens": 900, "temperature": None, "reasoning_effort": "low"}
    options = "judge_options: {max_completion_tokens: 900, temperature: null, reasoning_effort: low}\n"
    spec = load(write(tmp_path, GOOD + options))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    flags = ["max_completion_tokens=900", "temperature=None", "reasoning_effort=low"]
    args = parser.parse_args(["--data", "MMVet", "--judge-options", *flags])
    assert spec.options.judge_options == asked == check(command._raw(args), "eval").options.judge_options
    config = judge_config(spec.options, benchmarks.load("MMVet"))
    assert config is not None
    assert dict(config.extra) == asked
    assert config.identity.endswith(";max_completion_tokens=900;reasoning_effort='low';temperature=None")
    for wrong in ("max_tokens", "max_tokens=none"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--judge-options", wrong])


def test_several_numbers_are_one_value(tmp_path: Path) -> None:
    """As text or a list; several of these are a grid, and each is checked with its line."""

    def asked(written: str) -> list[Any]:
        text = GOOD.replace("{layer: [14, 16], ivc: 0.1}", f"{{depths: {written}}}").replace("ivc_prune", "pyramiddrop")
        return [v.parameters["depths"] for v in load(write(tmp_path, text)).variants("qwen25") if v.ratio == 0.25]

    assert asked("[0.3, 0.6]") == asked("'0.3,0.6'") == asked("[[0.3, 0.6]]") == [[0.3, 0.6]]
    assert asked("[[0.3, 0.6], '0.2,0.4']") == [[0.3, 0.6], [0.2, 0.4]]
    for wrong in ("0.3;0.6", "[0.3, x]", "[[0.3, true]]"):
        with pytest.raises(SpecError, match=r"line 6: .* must be numbers with commas between them"):
            asked(wrong)
    with pytest.raises(SpecError, match=r"line 6: 0.6 is no name of a parameter; several .* as a list, \{depths"):
        asked("0.3,0.6")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for words in ("cube=2,2,4", "cube=[2, 2, 4]", "cube=(2, 2, 4)"):
        args = parser.parse_args(["--method", "adaspark", "--set", words])
        (variant,) = [v for v, _ in check(command._raw(args), "eval").cells if v.method == "adaspark"][:1]
        assert variant.parameters == {"cube": [2, 2, 4]}
    with pytest.raises(SpecError, match=r"cube='2,2' .* must be 3 whole numbers with commas between them"):
        check(command._raw(parser.parse_args(["--method", "adaspark", "--set", "cube=2,2"])), "eval")


def test_expansion(tmp_path: Path) -> None:
    spec = load(write(tmp_path, GOOD))
    assert spec.name == "my"
    assert spec.options == Options(limit=10)
    cells = [(v.model, v.method, v.ratio, v.parameters.get("layer"), v.seed, b) for v, b in spec.cells]
    assert len(cells) == len(set(cells)) == 4 + (2 * 2 * 2 + 2 * 2) + 2
    assert cells[:4] == [(m, "none", 1.0, None, 0, b) for m in ("qwen25", "llava15") for b in ("POPE", "MMStar")]
    assert ("qwen25", "random", 0.5, None, 1, "POPE") in cells
    assert not [c for c in cells if c[0] == "llava15" and c[2] == 0.25]
    assert [v.parameters["layer"] for v in spec.variants("llava15")[1:]] == [14, 16]
    assert spec.benchmarks("llava15") == ["POPE", "MMStar"]


def test_controls_of_videos_stand_beside_methods_on_videos_only(tmp_path: Path) -> None:
    def controls(line: str = "") -> dict[str, set[str]]:
        text = GOOD.replace("POPE, MMStar", "tiny_clips, POPE").replace("controls: []\n", line)
        cells = load(write(tmp_path, text)).cells
        usual = {"none", "ivc_prune", "random"}
        return {name: {v.method for v, b in cells if b == name} - usual for name in ("tiny_clips", "POPE")}

    of_videos = {"fewer_frames", "uniform_time", "pool_time"}
    assert controls() == {"tiny_clips": {"uniform", "pool"} | of_videos, "POPE": {"uniform", "pool", "downsample"}}
    assert controls("controls: [fewer_frames]\n") == {"tiny_clips": {"fewer_frames"}, "POPE": set()}
    for control, shown, text in (("fewer_frames", "pictures", GOOD), ("downsample", "videos", CLIPS)):
        with pytest.raises(SpecError, match=f"'{control}' fits no benchmark of this sweep: all show {shown}"):
            load(write(tmp_path, text.replace("controls: []", f"controls: [{control}]")))


def test_frames_are_chosen_of_videos_only(tmp_path: Path) -> None:
    assert str(load(write(tmp_path, CLIPS + "nframe: 4\n")).options.sampling) == "nframe=4"
    assert str(load(write(tmp_path, CLIPS + "fps: 0.5\n")).options.sampling) == "fps=0.5"
    with pytest.raises(SpecError, match=r"line 16: nframe says which .* and POPE, MMStar shows none"):
        load(write(tmp_path, GOOD + "nframe: 4\n"))
    with pytest.raises(SpecError, match=r"line 17: fps 1.0 and nframe 4 both"):
        load(write(tmp_path, CLIPS + "nframe: 4\nfps: 1.0\n"))


def test_controls_stand_beside_every_method_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    def controls(line: str) -> list[tuple[str, str, float, int, str]]:
        spec = load(write(tmp_path, GOOD.replace("controls: []\n", line)))
        return sorted(
            (v.model, v.method, v.ratio, v.seed, b) for v, b in spec.cells if v.method not in ("none", "ivc_prune")
        )

    listed = [("qwen25", "random", 0.5, seed, "POPE") for seed in (0, 1)]
    assert controls("controls: []\n") == listed
    assert {method for _, method, *_ in controls("")} == {"random", "uniform", "pool", "downsample"}
    where = {(model, ratio, name) for model, method, ratio, _, name in controls("") if method == "uniform"}
    met = {(m, r, b) for m in ("qwen25", "llava15") for r in (0.5, 0.25) for b in ("POPE", "MMStar")}
    assert where == {key for key in met if key[:2] != ("llava15", 0.25)}, "wherever a method is measured"
    assert {(method, ratio) for _, method, ratio, *_ in {*controls("controls: [again]\n")} - {*listed}} == {
        ("again", 1)
    }
    assert controls("controls: [random]\n") == listed, "what the file lists itself is not added to"
    unlisted = GOOD.replace("method: random", "method: fastv").replace("controls: []\n", "controls: [random]\n")
    drawn = [
        (v.ratio, v.seed)
        for v, b in load(write(tmp_path, unlisted)).cells
        if (v.method, v.model, b) == ("random", "qwen25", "POPE")
    ]
    assert sorted(drawn) == [(ratio, seed) for ratio in (0.25, 0.5) for seed in (0, 1, 2)], "several draws by default"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("qwen25, llava15]", "qwem25, llava15]", 1, "did you mean 'qwen25'"),
        ("[POPE, MMStar]", "[POPE, MMStarr]", 2, "did you mean 'MMStar'"),
        ("method: ivc_prune", "method: ivc_prun", 4, "did you mean 'ivc_prune'"),
        ("[0.5, 0.25]\n", "[0.5, 25]\n", 5, "outside (0, 1]"),
        ("[0.5, 0.25]\n", "[0.5, half]\n", 5, "'half' is not a ratio"),
        ("layer:", "leyer:", 6, "did you mean 'layer'"),
        ("    ratios: [0.5]\n", "", 7, "needs ratios"),
        ("controls: []", "controls: [randon]", 14, "did you mean 'random'"),
        ("seeds: [0, 1]", "seeds: [0, 1.5]", 9, "1.5 is not a whole number"),
        ("models: [qwen25]", "models: [qwen2]", 10, "not among the sweep's models"),
        ("benchmarks: [POPE]\n", "benchmarks: [MME]\n", 11, "not among the sweep's benchmarks"),
        ("ratio: 0.25}", "ratio: 0.3}", 13, "excludes nothing"),
        ("model: llava15, ", "modell: llava15, ", 13, "did you mean 'model'"),
        ("limit: 10", "limit: -1", 15, "whole number above 0"),
        ("limit: 10", "limit: 10\nlimit: 11", 16, "stands here twice"),
        ("limit: 10", "limits: 10", 15, "did you mean 'limit'"),
        ("limit: 10", "limit: [", 16, "not YAML"),
        ("methods:", "method:", 3, "unknown key 'method'"),
        ("[qwen25, llava15]", "[qwen25, qwen25]", 1, "stands here twice"),
        ("[qwen25, llava15]", "{qwen25: 7, llava15: }", 1, "not a short name and a folder"),
        ("[qwen25, llava15]", "{qwen25: , 7: x}", 1, "not a short name and a folder"),
        ("[POPE, MMStar]", "[POPE, MMStar, POPE]", 2, "stands here twice"),
        ("method: ivc_prune\n", "ratio: 0.5\n", 4, "did you mean 'ratios'"),
        ("[0.5, 0.25]\n", "[0.5, 0]\n", 5, "ratio 0 is outside (0, 1]"),
        ("[0.5, 0.25]\n", "[0.5, 1.2]\n", 5, "ratio 1.2 is outside (0, 1]"),
        ("[0.5, 0.25]\n", "[0.5, .nan]\n", 5, "outside (0, 1]"),
        ("[0.5, 0.25]\n", "[0.5, true]\n", 5, "True is not a ratio"),
        ("[0.5, 0.25]\n", "[0.5, 0.5]\n", 5, "stands here twice"),
        ("[0.5, 0.25]\n", "\n", 5, "None is not a ratio"),
        ("{layer: [14, 16], ivc: 0.1}", "[14, 16]", 6, "expected parameters as a mapping"),
        ("layer: [14, 16]", "layer: []", 4, "one of its lists is empty"),
        ("layer: [14, 16]", "layer: deep", 6, "layer='deep' of method 'ivc_prune' must be int"),
        ("layer: [14, 16]", "[layer]: 14", 6, "a key must be a word"),
        (
            "method: random\n    ratios: [0.5]\n    seeds: [0, 1]",
            "method: ivc_prune\n    ratios: [0.5]\n    parameters: {layer: 14, ivc: 0.1}",
            7,
            "adds nothing to those above",
        ),
        ("seeds: [0, 1]", "seeds: []", 7, "one of its lists is empty"),
        ("{model: llava15, ratio: 0.25}", "{method: none}", 13, "the unpruned baseline of qwen25 on POPE"),
        ("{model: llava15, ratio: 0.25}", "{}", 13, "everything"),
        ("{model: llava15, ratio: 0.25}", "{benchmark: MME}", 13, "excludes nothing"),
        ("{model: llava15, ratio: 0.25}", "ratio", 13, "is not a rule"),
        ("limit: 10", "limit: 0", 15, "whole number above 0"),
        ("limit: 10", "limit: 10.5", 15, "whole number above 0"),
        ("limit: 10", "exact: 1", 15, "exact must be true or false"),
        ("limit: 10", "judge: [gpt-4o]", 15, "judge must be text"),
        ("limit: 10", "judge_options: 4096", 15, "judge_options must be KEY: VALUE, got 4096"),
        ("limit: 10", "judge_options: {max_tokens: 0}", 15, "max_tokens must be a whole number above 0"),
        ("limit: 10", "judge_options: {model: x}", 15, "'model' is not free to choose"),
        ("limit: 10", "dtype: float8", 15, "dtype must be one of float32, bfloat16, float16"),
        ("limit: 10", "attention: flash", 15, "attention must be one of"),
        ("limit: 10", "timeout: -3", 15, "a finite number above 0"),
        ("limit: 10", "budget: flop", 15, "flops"),
        ("limit: 10", "budget_prompt: [64, x]", 15, "number of tokens"),
        ("limit: 10", "limit: \x07", 15, "not YAML"),
        ("limit: 10", "min_pixels: 900\nmax_pixels: 800", 15, "min_pixels 900 is above max_pixels 800"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError) as caught:
        load(write(tmp_path, GOOD.replace(old, new, 1)))
    assert f"my.yaml, line {line}: " in str(caught.value)
    assert words in str(caught.value)


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in a document."""
    if place:
        yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield from places(child, (*place, key))


WRONG = (None, [], "nonsense", -1, 1.2, float("nan"), True, [[1]], {"a": 1}, datetime.date(2026, 1, 1))


@pytest.mark.parametrize("place", list(places(yaml.safe_load(GOOD))), ids=str)
def test_anything_wrong_anywhere_is_a_spec_error_or_valid(tmp_path: Path, place: tuple[Any, ...]) -> None:
    """Whatever stands where: a sweep, or an error with a line of the file; never another exception, never no cells."""
    refused = 0
    for wrong in WRONG:
        document = yaml.safe_load(GOOD)
        holder = document
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = wrong
        text = yaml.safe_dump(document, sort_keys=False)
        path = write(tmp_path, text)
        problem, spec = "", None
        try:
            spec = load(path)
        except SpecError as error:
            problem = str(error)
        if spec:
            assert any(variant.method != "none" for variant, _ in spec.cells), (place, wrong)
            continue
        refused += 1
        found = re.match(rf"{re.escape(str(path))}, line (\d+): .{{10}}", problem)
        assert found, problem
        assert 1 <= int(found[1]) <= text.count("\n")
    assert refused >= len(WRONG) // 2


@pytest.mark.parametrize("text", ["", "- a", "models: []\nbenchmarks: [POPE]\nmethods: []"])
def test_empty_files_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError):
        load(write(tmp_path, text))


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(path: Path) -> None:
    spec = load(path)
    assert {variant.method for variant, _ in spec.cells} > {"none"}


def test_the_field_has_every_method_of_pictures() -> None:
    """Of those that have results: all but what is made for videos, and what a server does."""
    asked = {variant.method for variant, _ in load(ROOT / "field.yaml").cells}
    assert set(KNOWN) - asked == {*of_videos(), "adaspark", "deployed"} - asked


def test_the_paper_s_sweep_is_the_matrix_on_four_families() -> None:
    spec = load(ROOT / "paper.yaml")
    assert len(spec.models) == 4
    for model in spec.models:
        assert spec.benchmarks(model) == list(benchmarks.names("matrix"))
        variants = spec.variants(model)
        methods = {variant.method for variant in variants}
        assert {"none", "ivc_prune", "random"} | {
            m + plus for m in ("fastv", "pyramiddrop") for plus in ("", "+ivc")
        } <= methods
        assert [v.ratio for v in variants if v.parameters.get("preset") == "official"] == [0.5], "the released settings"
    assert {path.stem for path in ROOT.glob("*.yaml")} >= {
        "smoke", "tiny", "paper", "ratios", "ablation_ivc", "controls",
    }  # fmt: skip
