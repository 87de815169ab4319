"""Prune the visual tokens of any supported LVLM, and measure against the unpruned baseline what it costs.

>>> with ivcp_eval.prune(model, "ivc_prune", ratio=0.5) as run:  # doctest: +SKIP
...     out = model.generate(**inputs)

Importing this package imports neither torch, transformers nor vlmeval.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ivcp_eval.engine import prune as prune
    from ivcp_eval.engine.cost.predicted import ratio_for as ratio_for
    from ivcp_eval.runs.answering.live import register as register

__version__ = "0.1.0"
__all__ = ["__version__", "prune", "ratio_for", "register"]

_LAZY = {
    "prune": "ivcp_eval.engine",
    "ratio_for": "ivcp_eval.engine.cost.predicted",
    "register": "ivcp_eval.runs.answering.live",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ivcp_eval' has no attribute {name!r}; it offers {', '.join(sorted(__all__))}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
