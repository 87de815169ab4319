"""Where data is read and results are written: in a checkout, or with an installed package.

A checkout keeps ``datasets/``, ``sweeps/`` and ``results/`` beside the package. A wheel carries the first two inside
the package (``ivcp_eval/shipped``, see pyproject.toml), and results then go to ``results/`` of the current folder.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
_SHIPPED = PACKAGE / "shipped"

CHECKOUT: Path | None = None if _SHIPPED.is_dir() else PACKAGE.parent
"""Root of the checkout that the package is imported from; None for an installed one."""

DATASETS = (CHECKOUT or _SHIPPED) / "datasets"
SWEEPS = (CHECKOUT or _SHIPPED) / "sweeps"
RESULTS = (CHECKOUT or Path.cwd()) / "results"


def sweep_file(path: str | Path) -> Path:
    """``path`` itself, or where no such file is, the shipped sweep of that name (``smoke``, ``sweeps/smoke.yaml``).

    Raises:
        FileNotFoundError: neither is there.
    """
    asked = Path(path)
    shipped = SWEEPS / f"{asked.stem}.yaml"
    named_so = asked.name == asked.stem or asked.parts == ("sweeps", shipped.name)
    found = shipped if not asked.exists() and named_so and shipped.is_file() else asked
    if not found.is_file():
        names = ", ".join(sorted(path.stem for path in SWEEPS.glob("*.yaml")))
        raise FileNotFoundError(f"{found} is no sweep file; give the path of one or the name of a shipped one: {names}")
    return found
