"""What methods have in common that wrap another: `NAME+ivc`, `NAME+dstp`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ivcp_eval.interface import AbstractMethod, Signal, TowerFacts, TowerSignal
from ivcp_eval.interface.method import method_name


@dataclass(frozen=True)
class Wrapper(AbstractMethod):
    """A method that lets another one, which selects tokens at a cut, choose.

    Attributes:
        inner: the method that selects.
    """

    suffix: ClassVar[str]  # of its name
    without: ClassVar[str]  # what a method that does not select cannot offer, to end a sentence

    inner: AbstractMethod

    if not TYPE_CHECKING:  # class variables of the base; here they are the inner method's

        @property
        def needs(self) -> frozenset[Signal]:
            """What the inner method needs."""
            return self.inner.needs

        @property
        def tower_signals(self) -> frozenset[TowerSignal]:
            """What the inner method wants of the vision tower."""
            return self.inner.tower_signals

        @property
        def sweep_seeds(self) -> tuple[int, ...]:
            """Those of the inner method."""
            return self.inner.sweep_seeds

    def __post_init__(self) -> None:
        """Refuse methods that select no tokens."""
        inside = "group" in self.inner.tower_signals  # of the tower, where no coordinate and no reserve is known
        if inside or self.inner.pixel_share(0.5) is not None or self.inner.needs & {"cached_key", "step"}:
            raise ValueError(self.refusal())

    def refusal(self) -> str:
        """Why the inner method cannot be wrapped."""
        return (
            f"{method_name(self.inner)!r} does not save by selecting tokens at a cut, so {self.without}; "
            f"{self.suffix} works with methods that do"
        )

    @property
    def name(self) -> str:
        """``fastv+ivc``: what users type and the CSV says."""
        return method_name(self.inner) + self.suffix

    def tower_blocks(self, tower: TowerFacts) -> Mapping[str, int]:
        """Those of the inner method."""
        return self.inner.tower_blocks(tower)
