"""Hooks that take signals from a decoder as it runs: projections of the layer before a cut, and position ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ivcp_eval.interface import AbstractAdapter, Signal
from ivcp_eval.interface.names import read

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Not signals of one decoder layer.
NOT_OF_A_LAYER: frozenset[Signal] = frozenset({"vision", "cached_key", "step", "motion", "sparse"})


def capture(
    adapter: AbstractAdapter, layer: Any, needs: frozenset[Signal], store: Callable[[str, Callable[[], Tensor]], None]
) -> list[Any]:
    """Register hooks on one decoder layer; returns their handles.

    Args:
        needs: signals wanted, those of other places included (they are left to others).
        store: called as ``store(signal, make)`` in every forward of the layer; ``make()`` gives (B, heads, S, D).
    """
    handles = []
    if "raw_value" in needs:
        value, split = adapter.projection(layer, "value")

        def project(_module: Any, args: Any) -> None:
            store("raw_value", lambda: split(value(args[0])))

        handles.append(layer.input_layernorm.register_forward_pre_hook(project))
    for signal in needs - NOT_OF_A_LAYER - {"raw_value"}:
        module, heads = adapter.projection(layer, signal)

        def keep(_m: Any, _a: Any, output: Tensor, name: str = signal, split: Any = heads) -> None:
            store(name, lambda: split(output))

        handles.append(module.register_forward_hook(keep))
    return handles


class Rotary:
    """The rotary embedding of a text model: which position ids it got in this forward, and embeddings of others."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._ids: Tensor | None = None
        self._own = False  # whether `embed` is calling

    def attach(self) -> list[Any]:
        """Register the hook; returns its handle."""
        return [self._module.register_forward_pre_hook(self._before, with_kwargs=True)]

    @property
    def ids(self) -> Tensor:
        """(B, S) position ids of the forward that is running, or (A, B, S) with several axes; B may be 1."""
        assert self._ids is not None, "the rotary embedding of this forward has not run"
        return self._ids

    def use(self, ids: Tensor) -> None:
        """Take the position ids of a forward that ran before."""
        self._ids = ids

    def embed(self, hidden: Tensor, position_ids: Tensor) -> Any:
        """Position embeddings of other ids, in the dtype of ``hidden``."""
        self._own = True
        try:
            return self._module(hidden, position_ids.to(hidden.device))
        finally:
            self._own = False

    def forget(self) -> None:
        """Drop the ids, when the forward has ended."""
        self._ids = None

    def _before(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._own:
            given = read(kwargs, "position_ids")
            self._ids = args[1] if given is None else given
