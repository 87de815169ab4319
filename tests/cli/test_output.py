"""What verbs print: how wide, how much under ``--quiet``, and that nothing is drawn over itself in files and pipes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from tqdm import tqdm

from ivcp_eval.cli import main, verbs
from ivcp_eval.cli.bars import bars_on_terminals_only
from ivcp_eval.lab.bench import pruning
from ivcp_eval.lab.bench.report import table as bench_table
from ivcp_eval.reports.compare import compare
from ivcp_eval.reports.table import read_results
from ivcp_eval.reports.terminal import fold
from ivcp_eval.reports.wide import tables

ROOT = Path(__file__).parents[2]
SWEEP = ("plan", "run", "work", "status", "results")


@pytest.mark.parametrize("verb", [*(verb for verb in verbs() if verb != "sweep"), *(f"sweep {verb}" for verb in SWEEP)])
def test_every_verb_can_be_quiet(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*verb.split(), "--help"])
    assert "--quiet" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["bench fork", "bench stats", "bench selection", "bench eval", "lab train tiny2"])
def test_the_help_of_other_parsers_names_it_too(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    assert capsys.readouterr().out.count("--quiet") == 1


def test_quiet_is_ours_and_the_rest_another_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []
    monkeypatch.setattr(pruning, "main", lambda arguments: got.append(arguments) or 0)
    assert main(["bench", "--quiet", "--size", "small"]) == 0
    assert main(["bench", "--", "--quiet"]) == 0
    assert got == [["--size", "small"], ["--quiet"]]


@pytest.mark.parametrize("arguments", [["list"], ["list", "--quiet"], ["list", "--all"]])
def test_list_begins_with_what_runs_here(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "POPE.tsv").touch()
    assert main(arguments) == 0
    out = capsys.readouterr().out
    names = out.replace(",", " ").split()
    assert {"qwen25", "internvl25_1b", "fastv", "random", "tiny_mcq", "POPE", "NAME+ivc"} <= set(names)
    assert names.index("tiny") < names.index("qwen25"), "the shipped model is the first"
    further = {"qwen25_3b", "MME"}
    assert (set(names) & further == further) == ("--all" in arguments)
    assert out.count("... and ") == (3 if arguments == ["list"] else 0)
    assert len(out.splitlines()) <= 60 or "--all" in arguments


@pytest.mark.parametrize(("what", "name", "note"), [("models", "tiny", "laboratory"), ("methods", "fastv", "Keeps")])
def test_list_says_more_of_one_kind(what: str, name: str, note: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", f"--{what}"]) == 0
    out = capsys.readouterr().out
    assert any(line.startswith(f"{name} ") and note in line for line in out.splitlines())
    assert f"`ivcp list --{what} --all`" in " ".join(out.split())
    assert "tiny_mcq" not in out


@pytest.mark.parametrize("width", [60, 80])
def test_tables_fold_to_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    results = ROOT / "results" / "tiny.csv"
    assert main(["list", "--all"]) == 0
    said = [capsys.readouterr().out]
    assert main(["list"]) == 0
    said.append(capsys.readouterr().out)
    assert main(["data", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said.append("\n".join(takewhile(lambda line: not line.endswith(":"), lines)))  # advice with addresses follows
    assert main(["sweep", "status", "smoke"]) == 0
    said.append(capsys.readouterr().out.split("\n\n")[0])
    said.append(compare(results, resamples=100).to_terminal())
    said += [table.to_terminal() for table in tables(read_results(results))]
    row = {"variant": "ivc_prune", "prefill_ms": 1.0, "flop_bound": 0.5, "over_bound": 0.1, "note": "words " * 30}
    said.append(bench_table([{**row, "cut_ms": 1.0, "select_ms": 2.0, "net_ms": 3.0, "kv_ratio": 0.5}]))
    for text in said:
        assert len(text.splitlines()) > 2
        assert max(map(len, text.splitlines())) <= width, text


def test_no_word_of_a_folded_table_is_lost() -> None:
    columns = {"name": ["a", "b"], "long": ["one two three four five six seven", "x"], "n": ["1", "2"]}
    narrow = fold(columns, ["name"], "long", width=40)
    assert max(map(len, narrow.splitlines())) <= 40
    assert narrow.split().count("one") == narrow.split().count("seven") == 1
    wide = fold(columns, ["name"], "long", width=80)
    assert wide.splitlines()[2].split() == ["a", *columns["long"][0].split(), "1"]
    apart = fold({"name": ["a"], "first": ["p" * 30], "second": ["q" * 30]}, ["name"], width=40)
    assert [line.split() for line in apart.splitlines() if "name" in line] == [["name", "first"], ["name", "second"]]


def test_bars_stay_out_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    with bars_on_terminals_only():
        sys.stderr.write("before\n")
        for _ in tqdm(range(3), mininterval=0, file=sys.stderr):
            for _ in tqdm(range(2), mininterval=0, leave=False, file=sys.stderr):
                pass
        sys.stderr.write("after\n")
    assert out.getvalue() == "before\nafter\n"


def test_bars_are_drawn_on_a_terminal_unless_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", out)
    for quiet, drawn in ((True, False), (False, True)):
        with bars_on_terminals_only(quiet):
            list(tqdm(range(3), mininterval=0, file=sys.stderr))
        assert ("3/3" in out.getvalue()) == drawn


_WARNS = """
import os, sys, warnings
from ivcp_eval.cli import main
from ivcp_eval.cli.results import published

def run(args):
    from transformers.utils import logging
    logger = logging.get_logger("transformers.models.any.processing")
    logger.warning_once("a library warns")
    warnings.warn("a module warns", FutureWarning)
    logger.error("a library fails")
    print("a result")
    return 0

published.run = run
main(["published", *sys.argv[1:]])
warnings.warn("afterwards", FutureWarning)
assert "TRANSFORMERS_VERBOSITY" not in os.environ
"""


def test_quiet_holds_back_what_libraries_warn_of_and_no_error(tmp_path: Path) -> None:
    """In a process of its own, where transformers is not imported before the verb runs, as on a command line."""
    script = tmp_path / "warns.py"
    script.write_text(_WARNS)
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    said = {}
    for option in ("", "--quiet"):
        command = [sys.executable, str(script), *filter(None, [option])]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout == "a result\n"
        said[option] = done.stderr
    assert all(text in said[""] for text in ("a library warns", "a module warns", "a library fails", "afterwards"))
    assert "warns" not in said["--quiet"].replace("warns.py", "")
    assert all(text in said["--quiet"] for text in ("a library fails", "afterwards"))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["eval", "--help"], ["list"], ["data", "--quick"], ["compare", "results/tiny.csv"]]
)
def test_a_reader_that_closes_the_pipe_is_no_error(arguments: list[str]) -> None:
    # `ivcp list` into a pipe nobody reads any more, as after `| head -1`.
    command = [sys.executable, "-m", "ivcp_eval", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_pipe_between_our_own_processes_that_breaks_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def main_of_bench(arguments: list[str]) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(pruning, "main", main_of_bench)
    assert main(["bench"]) == 2
    assert capfd.readouterr().err == "ivcp: BrokenPipeError: [Errno 32] Broken pipe\n"


def test_a_download_that_fails_is_said_by_us_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from ivcp_eval.vlmeval_bridge.environment import fetch

    before = logging.getLogger().level
    said = fetch((tmp_path / "gone.tsv").as_uri(), "", tmp_path / "here.tsv")
    assert "could not be fetched" in said
    assert not caplog.records
    assert logging.getLogger().level == before


def test_importing_vlmevalkit_says_nothing() -> None:
    code = "from ivcp_eval.vlmeval_bridge.environment import import_vlmeval; import_vlmeval()"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_loading_a_model_draws_nothing_over_our_bars(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    from ivcp_eval.interface import models
    from ivcp_eval.runs.answering.session import Session
    from ivcp_eval.runs.planning.placement import Limits, Placement

    logging.enable_progress_bar()
    weights = models.locate("tiny")
    Session(weights, Placement("cpu").resolve(), Limits.published(weights))
    assert logging.is_progress_bar_enabled(), "the caller's own setting stands"
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("", "")


@pytest.mark.parametrize("verb", ["compare", "report", "curves"])
@pytest.mark.parametrize("number", ["0", "-5", "many"])
def test_resamples_are_counted_from_one(verb: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "results/tiny.csv", f"--resamples={number}"])
    assert "--resamples" in capsys.readouterr().err


def test_a_results_file_that_is_none_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.csv").touch()
    for name, words in (("absent.csv", "there is no results file"), ("empty.csv", "is empty")):
        assert main(["compare", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error) < 300
