"""The only package that imports VLMEvalKit, and only when one of these functions is called.

Importing VLMEvalKit takes about ten seconds and changes its process (TLS defaults, gradients, logging, environment).
`environment.import_vlmeval` does it once, and undoes what would reach our own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ivcp_eval.files import remembered

__all__ = ["expected_md5", "knows", "register", "run_vlmeval"]


def knows(name: str) -> bool:
    """Whether VLMEvalKit has a data set of this name, or a TSV of it lies in its data root."""
    from ivcp_eval.vlmeval_bridge.environment import data_root

    return (data_root() / f"{name}.tsv").is_file() or bool(_of_vlmeval(name)["known"])


def expected_md5(name: str) -> str:
    """The checksum that VLMEvalKit notes for the file of one of its data sets; "" if it notes none."""
    return str(_of_vlmeval(name)["md5"])


def _of_vlmeval(name: str) -> dict[str, Any]:
    """Whether VLMEvalKit has a data set, and its checksum; remembered, for its import takes seconds."""
    spec = find_spec("vlmeval")
    if spec is None or spec.origin is None:
        return _ask_vlmeval(name)  # which says how to install it
    return remembered(Path(spec.origin), f"data set {name}", lambda _: _ask_vlmeval(name), dict)


def _ask_vlmeval(name: str) -> dict[str, Any]:
    from ivcp_eval.vlmeval_bridge.environment import import_vlmeval

    import_vlmeval()
    import vlmeval.dataset

    from ivcp_eval.vlmeval_bridge.reading.stock import expected_md5 as expected

    # Not its SUPPORTED_DATASETS, which keep a user's own benchmarks of earlier in this process.
    known = any(name in cls.supported_datasets() for cls in vlmeval.dataset.DATASET_CLASSES)
    return {"known": known, "md5": expected(name)}


def register(make: Callable[[str], Any] | None = None, models: Sequence[str] = ()) -> list[str]:
    """Make our benchmarks, and our models if there is a ``make``, known to VLMEvalKit in this process (idempotent).

    Afterwards ``vlmeval``'s own runner, ``build_dataset`` and ``supported_VLM`` know every benchmark under
    ``datasets/`` that ships here, and every model as ``MODEL``, ``MODEL__METHOD`` and ``MODEL__METHOD__rRATIO``.

    Args:
        make: gives VLMEvalKit's model of a variant name (`model.BridgedVLM`); see `runs.answering.live`.
        models: further variant names, for ratios that are not registered by default.

    Returns:
        The registered model names.

    Raises:
        ValueError: a variant name that cannot be understood. ImportError: VLMEvalKit is not installed.
    """
    from ivcp_eval.vlmeval_bridge.registration import register as register_all

    return register_all(make, models)


def run_vlmeval(arguments: Sequence[str], make: Callable[[str], Any]) -> int:
    """Call VLMEvalKit's own runner with its own arguments, our models (of ``make``) and benchmarks registered."""
    from ivcp_eval.vlmeval_bridge.registration import run

    return run(arguments, make)
