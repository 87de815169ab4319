"""Verbs whose options belong to another parser, and what the command itself answers."""

from __future__ import annotations

import ast
import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ivcp_eval import vlmeval_bridge
from ivcp_eval.cli import main, verbs
from ivcp_eval.files import DamagedError
from ivcp_eval.lab.bench import pruning as bench

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("separator", [[], ["--"], ["--quiet"], ["--quiet", "--"]])
@pytest.mark.parametrize(
    ("verb", "owner", "name"), [("bench", bench, "main"), ("vlmeval", vlmeval_bridge, "run_vlmeval")]
)
def test_leading_options_reach_their_parser(
    verb: str, owner: object, name: str, separator: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[list[str]] = []
    monkeypatch.setattr(owner, name, lambda arguments, *_: got.append(arguments) or 7)
    assert main([verb, *separator, "--size", "small", "--data", "A", "B"]) == 7
    assert got == [["--size", "small", "--data", "A", "B"]]


def test_a_bad_request_is_one_line_and_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--size", "smal"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("ivcp: unknown model size 'smal'; did you mean 'small'?")


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ivcp_eval.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([m for m in ('torch', 'transformers', 'vlmeval', 'pandas') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
    for verb in verbs():
        assert f"    {verb}" in out


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/table.pkl"),
            "is full: .*/x/table.pkl.* what was finished",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free some space and run the same command again"),
        (SystemExit(0), r"asked the program to end \(SystemExit: 0\); it did not"),
        (DamagedError(Path("/x/run.json"), "why", "do this"), r"ivcp: /x/run.json is damaged \(why\); do this"),
    ],
    ids=str,
)
def test_what_ends_a_verb_is_a_sentence(
    error: BaseException, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("ivcp_eval.cli.setup.list.run", fail)
    assert main(["list"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(words, said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_takes_nothing_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "ivcp_eval", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert "is full" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eval --every -1", "--every: must be a finite number of at least 0, got '-1'"),
        ("eval --every nan", "--every: must be a finite number of at least 0, got 'nan'"),
        ("sweep run smoke --every inf", "--every: must be a finite number of at least 0, got 'inf'"),
        ("eval --ratio 0", "--ratio: must be a finite number above 0 and at most 1, got '0'"),
        ("show a.jpg What? --ratio 1.1", "--ratio: must be a finite number above 0 and at most 1, got '1.1'"),
        ("eval --seed -1", "--seed: must be a whole number of at least 0, got '-1'"),
        ("eval --limit 0", "--limit: must be a whole number above 0, got '0'"),
        ("eval --timing many", "--timing: must be a whole number of at least 0, got 'many'"),
        ("eval --timeout 0", "--timeout: must be a finite number above 0, got '0'"),
        ("show a.jpg What? --max-new-tokens 0", "--max-new-tokens: must be a whole number above 0, got '0'"),
        ("published --kept 120", "--kept: must be a finite number above 0 and at most 100, got '120'"),
        ("calibrate hawk --questions 0", "--questions: must be a whole number above 0, got '0'"),
        ("bench --size tiny --tokens 0", "--tokens: must be a whole number above 0, got '0'"),
        ("bench stats --variants 1.5", "--variants: must be a whole number above 0, got '1.5'"),
    ],
)
def test_numbers_are_refused_in_one_way(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert said in " ".join(capsys.readouterr().err.split())


def test_every_number_of_a_command_line_is_checked() -> None:
    """`int` and `float` alone take -1, nan and inf."""
    found = []
    for path in sorted((ROOT / "ivcp_eval").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and any(
                isinstance(word, ast.Constant) and str(word.value).startswith("--") for word in call.args
            ):
                kinds = [ast.unparse(word.value) for word in call.keywords if word.arg == "type"]
                found += [f"{path.name}:{call.lineno}" for kind in kinds if kind in ("int", "float")]
    assert not found
