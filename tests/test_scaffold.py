"""A new method's files run as written; the check says in words what is wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ivcp_eval import locations
from ivcp_eval.interface import Unsupported
from ivcp_eval.registry import method_class
from ivcp_eval.scaffold import check_method, checkout, new_method

ROOT = Path(__file__).parent.parent


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
import importlib, pathlib, pytest
assert pytest.main(["-q", {test!r}]) == 0
from ivcp_eval.scaffold import check_method
print(check_method("longest_states", families=["llava"]).to_text())
print("---")
import ivcp_eval.methods.longest_states as module
path = pathlib.Path(module.__file__)
broken = path.read_text().replace("0000.00000", "2601.00001").replace("OWNER/REPOSITORY", "someone/something")
broken = broken.replace("def score", "def select(self, signals):\\n        return None\\n\\n    def score")
path.write_text(broken)
importlib.reload(module)
print(check_method("longest_states", families=["llava"]).to_text())
"""


@pytest.mark.slow
def test_new_method_runs_and_its_check_speaks(copy: Path) -> None:
    _, test = new_method("longest_states", copy)
    done = run_python(CHECK.format(test=str(test)), copy)
    assert done.returncode == 0, done.stdout + done.stderr
    written, broken = done.stdout.split("---")
    assert "still holds the template's '0000.00000'" in written
    assert written.count("FAILED") == 2, written  # both placeholders, and nothing of the contract
    assert "FAILED: llava, prefill_equals_reference" in broken
    assert "template" not in broken
    assert "`select` returned None, not a Selection" in broken


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
    monkeypatch.setattr(locations, "CHECKOUT", None)
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
