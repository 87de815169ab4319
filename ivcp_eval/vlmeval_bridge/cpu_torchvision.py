"""Let the CUDA build of torchvision be imported next to a CPU build of torch.

The package index carries one torchvision wheel for Linux, linked against CUDA. Beside a CPU-only torch its
``_C.so`` cannot be loaded, and ``import torchvision`` (hence ``import vlmeval`` and most of ``transformers``)
dies with ``operator torchvision::nms does not exist``. transforms and io need none of those operators, so it
is enough to declare the two that are looked up at import; calling them still fails. Where the native library
loads, nothing is declared and the native operators are used.

``make setup`` activates this through one ``.pth`` line, so that any Python of the environment can import
transformers; nothing happens until somebody imports torchvision.

See pytorch/vision#9077 and #9085.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# Libraries registered with torch vanish when garbage-collected, so they must outlive the call.
_DECLARED: list[object] = []


def declare_missing_operators(torchvision_folder: str) -> bool:
    """Declare ``nms``/``qnms`` if the native library in ``torchvision_folder`` cannot be loaded; True if declared."""
    from pathlib import Path

    import torch

    if _DECLARED:
        return True
    for library in sorted(Path(torchvision_folder).glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return False
    declared = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(declared)
    return True


class _Finder:
    """Meta-path finder that acts once, on the first import of torchvision, and then steps aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        uninstall()
        spec = importlib.util.find_spec("torchvision")
        if spec is not None and spec.submodule_search_locations:
            declare_missing_operators(spec.submodule_search_locations[0])
        return spec


def uninstall() -> None:
    """Remove the finder."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != _Finder.__name__]


def install() -> None:
    """Put the finder in place (idempotent). Standard library only until torchvision is imported."""
    uninstall()
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _Finder())
