"""Another package's method, installed beside an installed ivcp-eval, evaluated from an empty folder.

Fresh is the environment (``python -m venv``) and everything of ours in it: ivcp-eval is built into a wheel and
installed by pip, as is the plug-in that CONTRIBUTING.md shows. Not fresh are the third-party libraries (torch,
transformers, VLMEvalKit, the build back ends): a ``.pth`` line lends those of the environment that runs the tests, so
that nothing is downloaded. The editable ivcp-eval of that environment is not lent along; the first test proves it. Nor
is the ``.pth`` line by which ``make setup`` lets any program import torchvision: ``ivcp`` must do without.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from ivcp_eval.reports.table import Row, read_results

ROOT = Path(__file__).parents[2]
EVAL = ("eval", "--model", "tiny", "--data", "tiny_short", "--limit", "2", "--max-new-tokens", "4", "--ratio", "0.25")
pytestmark = pytest.mark.slow


def documented_package() -> dict[str, str]:
    """The two files that CONTRIBUTING.md shows."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("### A method in a package of your own")[1]
    toml, python = re.findall(r"```(?:toml|python)\n(.*?)```", section, flags=re.DOTALL)[:2]
    return {"pyproject.toml": toml, "longest_states.py": python}


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and a folder to call its commands in."""

    root: Path
    cwd: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.root / "bin" / "python"

    def run(self, *command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """A command of the environment, with nothing of the caller's Python settings."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        env = {**kept, "HOME": str(self.root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        first, *rest = map(str, command)
        return subprocess.run(
            [self.root / "bin" / first, *rest],
            cwd=cwd or self.cwd,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    def ivcp(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """What a successful ``ivcp`` prints."""
        done = self.run("ivcp", *arguments, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, folder: Path) -> None:
        """``pip install``, of the folder alone and without a network."""
        offline = ("--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "--disable-pip-version-check")
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet", "--force-reinstall"]
        done = subprocess.run([*pip, *offline, str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def rows(self, method: str) -> list[Row]:
        """Of a method, in the folder of the calls."""
        return [row for row in read_results(self.cwd / "results" / "eval" / "tiny.csv") if row["method"] == method]


def write_package(folder: Path, files: Mapping[str, str]) -> Path:
    """The folder, filled."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A new environment with an installed ivcp-eval; see the module's docstring for what is lent."""
    root, cwd = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    environment = Environment(root, cwd)
    site = Path(
        environment.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    )
    lent = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "lent.pth").write_text("\n".join(lent) + "\n")
    before = {path.name for path in site.iterdir()}
    environment.install(ROOT)
    added = {path.name for path in site.iterdir()} - before
    assert {name for name in added if not name.endswith(".dist-info")} == {"ivcp_eval", "model_adapters"}
    return environment


def test_an_installed_package_evaluates_in_an_empty_folder(fresh: Environment) -> None:
    code = "import ivcp_eval, model_adapters, datasets; print(ivcp_eval.__file__, model_adapters.__file__)"
    for file in fresh.run("python", "-c", code).stdout.split():
        assert Path(file).is_relative_to(fresh.root), "the checkout is what was tested"
    before = {path for path in fresh.root.rglob("*") if "__pycache__" not in path.parts}
    said = fresh.ivcp(*EVAL)
    assert "results: " in said
    rows = [*fresh.rows("none"), *fresh.rows("ivc_prune")]
    assert {row["method"] for row in rows} == {"none", "ivc_prune"}
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["method_source"] for row in rows} == {""}
    assert all(row["ivcp_commit"].startswith("version 0.") and row["ivcp_dirty"] is None for row in rows)
    assert len({row["ivcp_commit"] for row in rows}) == 1, "one installation, whatever the method"
    after = {path for path in fresh.root.rglob("*") if "__pycache__" not in path.parts}
    made = {path.relative_to(fresh.root).parts[0] for path in after - before}
    assert made <= {"LMUData", ".cache", ".config"}, "results belong to the current folder, not to the environment"
    published = next(fresh.root.rglob("shipped/baselines/ivc_prune_paper.csv"))
    done = fresh.run("ivcp", "compare", "results/eval/tiny.csv", published)
    assert "the baseline file knows the models deepseek_vl2_small" in done.stderr
    assert (fresh.cwd / "results" / "eval" / "tiny.csv").is_file()
    assert "tiny_short" in fresh.ivcp("list")
    planned = fresh.ivcp("sweep", "plan", "smoke")
    assert "cells" in planned
    assert "not here" not in planned


def test_a_package_of_fifteen_lines_adds_a_method(fresh: Environment, tmp_path: Path) -> None:
    files = documented_package()
    lines = [line for text in files.values() for line in text.splitlines() if line.strip()]
    assert len(lines) <= 15
    assert "longest_states" not in fresh.ivcp("list", "--methods"), "the package must be what brings the method"
    fresh.install(write_package(tmp_path / "one", files))
    listed = fresh.ivcp("list", "--methods")
    assert re.search(r"^longest_states +plug-in +from longest-states 1\.0", listed, flags=re.MULTILINE)

    fresh.ivcp(*EVAL, "--method", "longest_states")
    row = fresh.rows("longest_states")[-1]
    assert (row["method"], row["status"], row["faithfulness"]) == ("longest_states", "ok", "variant")
    assert re.fullmatch(r"longest-states 1\.0 \(code [0-9a-f]{12}\)", row["method_source"])
    assert json.loads(row["method_parameters"]) == {"layer": 2}
    assert 0.2 < row["ratio_kept_final"] < 0.3

    wrapped = "from ivcp_eval.interface import registry as r; print(r.make_method('longest_states+ivc', {'layer': 3}))"
    assert "inner=Method(layer=3)" in fresh.run("python", "-c", wrapped).stdout

    # The contract is in a checkout; what it checks is the installed package.
    checked = fresh.ivcp("method", "check", "longest_states", "--families", "llava", cwd=ROOT)
    assert re.search(r"^\d\d+ checks passed, 0 failed$", checked, flags=re.MULTILINE)
    elsewhere = fresh.run("ivcp", "method", "check", "longest_states")
    assert elsewhere.returncode == 2
    assert "clone the repository" in elsewhere.stderr

    # Other code under the same version is another measurement; finished answers of the old one are not reused.
    files["longest_states.py"] = files["longest_states.py"].replace(".norm(dim=-1)", ".norm(dim=-1).neg()")
    fresh.install(write_package(tmp_path / "two", files))
    assert "reusing 1 finished of 2 cells" in fresh.ivcp(*EVAL, "--method", "longest_states")
    other = fresh.rows("longest_states")[-1]
    assert other["run_id"] != row["run_id"]
    assert other["method_source"] != row["method_source"]


BROKEN = {
    "pyproject.toml": """
[project]
name = "broken-methods"
version = "0.3"
[tool.setuptools]
py-modules = ["broken_import", "broken_class"]
[project.entry-points."ivcp_eval.methods"]
missing_import = "broken_import"
fastv = "broken_class"
no_method = "broken_class:Other"
unfrozen = "broken_class"
"Bad Name" = "broken_class"
""",
    "broken_import.py": "import a_library_that_nobody_has\n",
    "broken_class.py": """
from ivcp_eval.interface import AbstractScorer
class Other: ...
class Method(AbstractScorer):
    def cuts(self, model, ratio): return ()
    def score(self, signals): return signals.visual
""",
}


def test_broken_packages_are_named_and_spoil_nothing(fresh: Environment, tmp_path: Path) -> None:
    fresh.install(write_package(tmp_path / "broken", BROKEN))
    listed = " ".join(fresh.ivcp("list", "--methods").split())
    assert "fastv refused from broken-methods 0.3; cannot be used: 'fastv' is a method of ivcp-eval itself" in listed
    assert "Bad Name refused" in listed
    for name, words in (
        ("missing_import", "method 'missing_import' of broken-methods 0.3 cannot be imported (ModuleNotFoundError"),
        ("no_method", "broken_class:Other does not derive from AbstractMethod"),
        ("unfrozen", "is not a frozen dataclass"),
        ("Bad Name", "rename its entry point"),
    ):
        done = fresh.run("ivcp", *EVAL, "--method", name)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    done = fresh.run("ivcp", *EVAL, "--method", "fastv")
    assert done.returncode == 0, done.stderr
    assert "method 'fastv' of broken-methods 0.3 is not used" in done.stderr
    assert {row["method_source"] for row in fresh.rows("fastv")} == {""}
