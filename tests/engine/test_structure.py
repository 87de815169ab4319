"""How the engine's classes are built on each other."""

from __future__ import annotations

import inspect

import pytest

import ivcp_eval.engine.fork
from ivcp_eval.engine.hooks import Engine
from ivcp_eval.engine.parts import Listener
from ivcp_eval.lab.training.gating import Gating

LEAVES = [*Engine.__subclasses__(), *Listener.__subclasses__()]
assert Gating in LEAVES


def test_every_engine_and_listener_is_known() -> None:
    assert ivcp_eval.engine.fork
    assert {leaf.__name__ for leaf in LEAVES} == {
        *("Pruner", "Trunk", "Branch", "Joined", "Gating"),
        *("VisionListener", "KeyEditor", "StepMasks", "SparseLayers"),
    }


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_leaves_fill_in_public_hooks_only(leaf: type) -> None:
    """Private methods of a base class are its own, and leaves have no subclasses."""
    base = leaf.__mro__[1]
    own = {name for name, value in vars(leaf).items() if inspect.isfunction(value) and hasattr(base, name)}
    assert not {name for name in own if name.startswith("_")} - {"__init__"}
    if base is Engine:
        assert own - {"__init__"} == Engine.__abstractmethods__
    assert not leaf.__subclasses__()
