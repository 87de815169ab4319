"""The shipped model, held still, for tests of what is trained and searched for beside it."""

from __future__ import annotations

import pytest

from ivcp_eval.interface import models
from ivcp_eval.lab.training.examples import Generated
from ivcp_eval.lab.training.frozen import Encoded, Frozen
from ivcp_eval.runs.planning.placement import Placement


@pytest.fixture(scope="session")
def frozen() -> Frozen:
    """The first embedded model."""
    return Frozen(models.locate("tiny", None), Placement("cpu", "float32", "sdpa"))


@pytest.fixture(scope="session")
def boxes(frozen: Frozen) -> list[Encoded]:
    """Two groundings of its validation split, with their answers."""
    examples = Generated("tiny", ["box"])
    return [frozen.encoded(examples.validation(number)) for number in range(2)]
