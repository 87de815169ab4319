"""README.md is current, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys

from ivcp_eval.cli import main
from ivcp_eval.files import PACKAGE

ROOT = PACKAGE.parent


def test_generated_parts_are_current() -> None:
    assert main(["docs", "--check"]) == 0


def test_relative_links_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_files_that_documents_name_exist() -> None:
    folders = [ROOT, PACKAGE, PACKAGE / "engine", PACKAGE / "vlmeval_bridge"]
    lost = []
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "design").glob("*.md"))]:
        for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|yaml|csv))`", document.read_text(encoding="utf-8")):
            if "NAME" not in name and not any((folder / name).is_file() for folder in folders):
                lost.append(f"{document.name}: {name}")
    assert not lost


def test_the_python_of_the_readme_runs_as_it_stands() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[50] [")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
