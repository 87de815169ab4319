"""Oracle: answers of the authors' own functions on random inputs, recorded; see the READMEs of oracle/data (images)
and oracle/video.

``--oracle-dir FOLDER`` reads other files of the same layout, in the folder or below it. Of a file that no mapping knows
the test says so.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.tiny_models import WHERE

FOLDER = Path(__file__).parent / "oracle"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recorded" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("oracle_dir") or FOLDER)
        files = sorted(folder.rglob("*.npz"))
        if not files:
            raise pytest.UsageError(f"{folder} holds no .npz file of recorded answers")
        pairs = [(file, name) for file in files for name in sorted({key.split("/")[0] for key in np.load(file).files})]
        metafunc.parametrize(("recorded", "name"), pairs, ids=[f"{file.stem}-{name}" for file, name in pairs])


def test_the_answers_are_the_authors(recorded: Path, name: str) -> None:
    if not (FOLDER / f"{recorded.stem}.py").exists():
        pytest.skip(f"no method here answers to {recorded.name}; tests/methods/oracle/{recorded.stem}.py would")
    arrays = np.load(recorded)
    parts = {key.split("/")[1]: arrays[key] for key in arrays.files if key.startswith(f"{name}/")}
    case = {key: torch.from_numpy(np.array(value)) for key, value in parts.items()}
    with torch.device(WHERE.device):
        here = {key: value.to(WHERE.device) for key, value in case.items()}
        made = import_module(f"tests.methods.oracle.{recorded.stem}").outputs(here)
    assert made
    for key, got in ((key, value.cpu()) for key, value in made.items()):
        wanted = case[key]
        if wanted.is_floating_point():
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
        else:
            assert got.tolist() == wanted.tolist(), key


def test_every_mapping_has_a_file() -> None:
    known = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert known == {path.stem for path in FOLDER.rglob("*.npz")}
