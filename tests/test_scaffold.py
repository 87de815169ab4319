"""A new method's files run as written; the check says in words what is wrong; a plug-in package is found and prunes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ivcp_eval.scaffold import ROOT, check_method, new_method

PLUGIN = '''
from dataclasses import dataclass
from ivcp_eval.interface import AbstractScorer, Cut

@dataclass(frozen=True)
class Method(AbstractScorer):
    """Keeps the last tokens of each image."""
    layer: int = 1

    def cuts(self, model, ratio):
        return (Cut(max(self.layer, model.first_cut), ratio),)

    def score(self, signals):
        return signals.visual.float()
'''

USE = """
from ivcp_eval import cpu_torchvision; cpu_torchvision.install()
import torch, ivcp_eval
from ivcp_eval.registry import method_names
from tests import tiny_models
torch.set_num_threads(1)
assert "last_tokens" in method_names()
model, make_inputs = tiny_models.build("qwen2_5_vl")
inputs = make_inputs("t5 i0 t9")
with torch.no_grad(), ivcp_eval.prune(model, "last_tokens", ratio=0.25) as run:
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
visual = (inputs["input_ids"][0] == tiny_models.family("qwen2_5_vl").IMAGE).nonzero().flatten().tolist()
kept = [c for c in run.kept[0].tolist() if c in visual]
assert kept == visual[-6:], kept
with ivcp_eval.prune(model, "last_tokens+ivc", ratio=0.25, layer=2):
    pass
print("pruned with a plug-in")
"""


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


@pytest.mark.slow
def test_a_package_of_fifteen_lines_adds_a_method(tmp_path: Path) -> None:
    assert len(PLUGIN.strip().splitlines()) <= 15
    (tmp_path / "last_tokens.py").write_text(PLUGIN)
    info = tmp_path / "last_tokens-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: last-tokens\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ivcp_eval.methods]\nlast_tokens = last_tokens\n")
    done = run_python(USE, tmp_path, ROOT)
    assert done.returncode == 0, done.stderr
    assert "pruned with a plug-in" in done.stdout
    without = run_python("from ivcp_eval.registry import method_names; print(method_names())", ROOT)
    assert "fastv" in without.stdout
    assert "last_tokens" not in without.stdout, "the package must be what brings the method"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
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
def test_new_method_runs_and_its_check_speaks(checkout: Path) -> None:
    _, test = new_method("longest_states", checkout)
    done = run_python(CHECK.format(test=str(test)), checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    written, broken = done.stdout.split("---")
    assert "still holds the template's '0000.00000'" in written
    assert written.count("FAILED") == 2, written  # both placeholders, and nothing of the contract
    assert "FAILED: llava, prefill_equals_reference" in broken
    assert "template" not in broken
    assert "`select` returned None, not a Selection" in broken


def test_names_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    for name, message in (("Fast V", "lower-case"), ("_x", "lower-case"), ("fastv", "exists already")):
        with pytest.raises(ValueError, match=message):
            new_method(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_names_in_check() -> None:
    with pytest.raises(ValueError, match="unknown method"):
        check_method("fastw")
    with pytest.raises(ValueError, match="did you mean 'llava'"):
        check_method("fastv", families=["lava"])
