"""Threads that share one model inside one block take turns, since the state of a forward is the block's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any


class Turns:
    """A lock that one thread holds while it is inside any of some modules."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = list(dict.fromkeys(modules))
        self._lock = threading.RLock()
        self._inside = threading.local()

    def open(self) -> list[Any]:
        """Register the hooks that wait for the turn, to be first on their modules; returns their handles."""
        return [module.register_forward_pre_hook(self._enter) for module in self._modules]

    def close(self) -> list[Any]:
        """Register the hooks that end the turn, to be last on their modules; returns their handles."""
        return [module.register_forward_hook(self._leave, always_call=True) for module in self._modules]

    def end(self) -> None:
        """Give up a turn that an interrupt left this thread with."""
        for module in reversed(self._held()):
            self._leave(module)

    def _held(self) -> list[Any]:
        if not hasattr(self._inside, "modules"):
            self._inside.modules = []
        return list(self._inside.modules)

    def _enter(self, module: Any, *_: Any) -> None:
        self._lock.acquire()
        self._held()
        self._inside.modules.append(module)

    def _leave(self, module: Any, *_: Any) -> None:
        held = self._held()
        # A hook of someone else may have raised before `_enter` ran.
        if held and held[-1] is module:
            self._inside.modules.pop()
            self._lock.release()
