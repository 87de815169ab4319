"""Hooks that take a method's signals from the decoder layer before a cut, as the model computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ivcp_eval.interface import AbstractAdapter, Signal

if TYPE_CHECKING:
    from torch import Tensor

ELSEWHERE: frozenset[Signal] = frozenset({"vision", "cached_key", "step"})  # not signals of one decoder layer


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
    for signal in needs - ELSEWHERE - {"raw_value"}:
        module, heads = adapter.projection(layer, signal)

        def keep(_m: Any, _a: Any, output: Tensor, name: str = signal, split: Any = heads) -> None:
            store(name, lambda: split(output))

        handles.append(module.register_forward_hook(keep))
    return handles
