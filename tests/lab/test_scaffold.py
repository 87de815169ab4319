"""A new method's files run as written; the check says in words what is wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ivcp_eval import files
from ivcp_eval.interface import Unsupported
from ivcp_eval.interface.registry import method_class
from ivcp_eval.lab.scaffold import check_method, checkout, new_method

ROOT = Path(__file__).parents[2]


def run_python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that finds packages in ``paths`` first."""
    # A development install may have imported the package already, while the interpreter started.
    setup = f"""
import sys
sys.path[:0] = {[str(path) for path in paths]!r}
for module in [name for name in sys.modules if name.partition(".")[0] == "ivcp_eval"]:
    del sys.modules[module]
"""
    return subprocess.run([sys.executable, "-c", setup + code], capture_output=True, text=True, cwd="/", check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the contract needs."""
    for name in ("ivcp_eval", "model_adapters", "tests"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__", "*.npz", "*.safetensors", "oracle"),
        )
    return tmp_path


CHECK = """
import pathlib, sys, pytest
import ivcp_eval.methods.longest_states as module
path = pathlib.Path(module.__file__)
text = path.read_text()
assert pytest.main(["-q", {test!r}]) == 0
from ivcp_eval.lab.scaffold import check_method
def check(old="", new=""):
    assert old in text
    path.write_text(text.replace(old, new))
    for compiled in path.parent.glob("__pycache__/longest_states*"):
        compiled.unlink()
    sys.modules.pop("ivcp_eval.methods.longest_states", None)  # imported anew by the check
    print(check_method("longest_states", ["llava"]).to_text() + "\\n---")
check()
score = "return signals.hidden[signals.visual].float().norm(dim=-1)"
for old, new in (
    (score, "return signals.hidden.float().norm(dim=-1)"),
    (score, "return signals.query[0, signals.visual].norm(dim=-1)"),
    (score, "import torch; return torch.rand(signals.n_visual)"),
    (score, "signals.hidden.mul_(2); " + score),
    (score, "signals.hidden.data.mul_(2); " + score),
    (score, score + ".log().sub(99).sqrt()"),
    ("def score", "def select(self, signals):\\n        return None\\n\\n    def score"),
    ("max(self.layer, model.first_cut)", "99"),
    ("@dataclass(frozen=True)", "@dataclass"),
    ("def score(self, signals: Signals)", "def score(self, signals: Signals))"),
):
    check(old, new)
"""


@pytest.mark.slow
def test_new_method_runs_and_its_check_speaks(copy: Path) -> None:
    _, test = new_method("longest_states", copy)
    done = run_python(CHECK.format(test=str(test)), copy)
    assert done.returncode == 0, done.stdout + done.stderr
    written, *broken = done.stdout.split("---\n")[:-1]
    assert "to do before merging: the docstring still holds the template's '0000.00000'" in written
    assert "FAILED" not in written
    assert re.search(r"^\d\d checks passed, 0 failed$", written, re.MULTILINE)
    words = (
        r"`score` returned shape \(\d+,\), expected \(\d+,\): one number per visual token",
        r"'NoneType' object.*at longest_states.py:\d+ `return signals.query.*`needs` declares nothing",
        "answered differently the second time; draw from signals.generator",
        r"wrote into signals\.hidden",
        "`select` changed signals.hidden in place",
        "scores are not finite",
        "`select` gave None, expected a Selection",
        "layer 99 of method 'longest_states' is outside",
        "`Method` cannot be|cannot be used: TypeError: cannot inherit|is not a frozen dataclass",
        "cannot be used: SyntaxError: unmatched",
    )
    assert len(broken) == len(words)
    for said, wanted in zip(broken, words, strict=True):
        assert re.search(wanted, said), said
        assert said.count("FAILED") == 1, said
        assert "Traceback" not in said


@pytest.mark.slow
def test_the_template_s_test_fails_when_the_method_is_broken(copy: Path) -> None:
    method, test = new_method("longest_states", copy)
    method.write_text(method.read_text().replace(".norm(dim=-1)", ".sum(dim=-1)"))
    done = run_python(f"import pytest, sys; sys.exit(pytest.main(['-q', {str(test)!r}]))", copy)
    assert done.returncode == 1
    assert "test_formula" in done.stdout


def test_names_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    for name, message in (
        ("Fast V", "lower-case"),
        ("_x", "lower-case"),
        ("a__b", "single underscores"),
        ("import", "lower-case"),
        ("fastv", "exists already"),
    ):
        with pytest.raises(ValueError, match=message):
            new_method(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_names_in_check() -> None:
    with pytest.raises(ValueError, match="unknown method"):
        check_method("fastw")
    with pytest.raises(ValueError, match="did you mean 'llava'"):
        check_method("fastv", families=["lava"])


def test_an_installed_package_looks_for_a_checkout_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkout("x") == ROOT
    monkeypatch.setattr(files, "CHECKOUT", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"a new method is a file in a checkout.*clone the repository"):
        new_method("my_method")
    with pytest.raises(FileNotFoundError, match="the contract is in a checkout"):
        check_method("none", families=["llava"])
    monkeypatch.chdir(ROOT)
    assert checkout("x") == ROOT


def test_a_method_that_runs_nowhere_has_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object, model: object, ratio: float) -> None:
        raise Unsupported("it needs depth")

    monkeypatch.setattr(method_class("uniform"), "cuts", refuse)
    report = check_method("uniform", families=["llava"])
    assert report.unsupported == ["llava: it needs depth"]
    assert report.failures == ["it runs on none of these families, so nothing was checked"]
