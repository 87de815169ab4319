"""What the loop asks of a part that it trains, and the kind of part that most are: a choice among tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ivcp_eval.interface.registry import module_names, unknown
from ivcp_eval.lab.training.examples import Examples
from ivcp_eval.lab.training.frozen import Encoded, Example, Frozen

PARTS = "ivcp_eval.lab.training.parts"
Loss = tuple[Tensor, dict[str, float]]
"""What is made small, and further figures for the curve."""


class Part(ABC):
    """One part: a network, and what an example says about it.

    Args:
        frozen: the model, which stays as it is.
        options: section ``part`` of the configuration; the file beside the part's holds every default.
        example: any, to learn from how wide the states are that a network reads.

    Attributes:
        net: what is trained. Its `state_dict` is what the method reads.
        origin: what the card says of it.
    """

    origin: ClassVar[str] = (
        "A variant, trained here: the authors' weights are not public. The model itself was not changed."
    )
    net: nn.Module

    def __init__(self, frozen: Frozen, options: Mapping[str, Any], example: Encoded) -> None:
        self.frozen, self.options = frozen, options
        del example

    def groups(self) -> list[dict[str, Any]]:
        """What the optimizer gets: parameters, and the ``share`` of the rate at which they are trained."""
        return [{"params": list(self.net.parameters()), "share": 1.0}]

    def encoded(self, example: Example) -> Any:
        """The example as `loss` takes it."""
        return self.frozen.encoded(example)

    @abstractmethod
    def loss(self, example: Any, rng: np.random.Generator, done: float) -> Loss:
        """Of one example, as `encoded` gives it.

        ``rng`` is the only source of chance, ``done`` the share of the training that is over.
        """

    def prepare(self, examples: Examples, folder: Path, tell: Callable[[str], None]) -> None:  # noqa: B027
        """What has to come before the first step (labels, searches), in ``folder`` so that it resumes; else nothing."""

    def finish(self, folder: Path) -> None:  # noqa: B027
        """Write what there is beside the weights when all steps are done; else nothing."""


def part_names() -> tuple[str, ...]:
    """Every part, by its file."""
    return module_names(PARTS)


def part_class(name: str) -> type[Part]:
    """The ``Part`` of a name; ValueError if there is none."""
    from importlib import import_module

    if name not in part_names():
        raise unknown("trained part", name, part_names())
    cls: type[Part] = import_module(f"{PARTS}.{name}").Part
    return cls


def default_config(name: str) -> Path:
    """The shipped configuration of a part."""
    return Path(__file__).parent / "parts" / f"{name}.yaml"
