"""README.md is current, and its links lead somewhere."""

from __future__ import annotations

import re

from ivcp_eval.cli import main
from ivcp_eval.files import PACKAGE

ROOT = PACKAGE.parent


def test_generated_parts_are_current() -> None:
    assert main(["docs", "--check"]) == 0


def test_relative_links_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
