"""Registration with VLMEvalKit: its containers are filled in place; nothing of it is patched."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ivcp_eval.interface import models, variants
from ivcp_eval.interface.registry import make_method, method_names
from ivcp_eval.vlmeval_bridge.environment import import_vlmeval

DEFAULT_RATIOS = (0.9, 0.75, 0.5, 0.35, 0.25, 0.11, 0.1)


def register(make: Callable[[str], Any] | None, extra: Sequence[str] = ()) -> list[str]:
    """See `ivcp_eval.vlmeval_bridge.register`."""
    import_vlmeval()
    import vlmeval.dataset
    from vlmeval.config import supported_VLM

    from ivcp_eval.vlmeval_bridge.datasets import CLASSES

    for cls in CLASSES:
        if cls not in vlmeval.dataset.DATASET_CLASSES:
            vlmeval.dataset.DATASET_CLASSES.insert(0, cls)
            vlmeval.dataset.SUPPORTED_DATASETS.extend(cls.supported_datasets())
        setattr(vlmeval.dataset, cls.__name__, cls)
    if make is None:
        return []
    for name in extra:
        _check(variants.parse(name))
    names = [*default_names(), *extra]
    for name in names:
        supported_VLM[name] = partial(_made, make, name)
    return names


def _made(make: Callable[[str], Any], name: str, **_: Any) -> Any:
    """What VLMEvalKit calls, with options of its own models."""
    return make(name)


def default_names() -> list[str]:
    """Every model unpruned, and with every method at the default ratio and a few others."""
    names = []
    for model in models.checkpoints():
        names.append(model)
        for method in method_names():
            if method != variants.BASELINE:
                names.append(variants.SEPARATOR.join((model, method)))
                names += [variants.Variant(model, method, ratio).name for ratio in DEFAULT_RATIOS]
    return names


def _check(variant: variants.Variant) -> None:
    models.find(variant.model)
    make_method(variant.method, variant.parameters)


def _check_files(arguments: Sequence[str]) -> None:
    """Raise ValueError if VLMEvalKit's own reader, which runs cells and replaces files, must not get a file."""
    from ivcp_eval.vlmeval_bridge.environment import data_root
    from ivcp_eval.vlmeval_bridge.reading import stock, tsv

    in_data = False
    for word in arguments:
        in_data = word == "--data" or (in_data and not word.startswith("--"))
        path = data_root() / f"{word}.tsv"
        if in_data and path.is_file():
            tsv.read(path, stock.expected_md5(word))


def run(arguments: Sequence[str], make: Callable[[str], Any]) -> int:
    """Run ``python -m vlmeval.run`` in this process with our names registered; returns its exit code."""
    names = [a for a in arguments if variants.SEPARATOR in a]
    register(make, names)
    _check_files(arguments)
    before = sys.argv
    sys.argv = ["vlmeval", *arguments]
    try:
        runpy.run_module("vlmeval.run", run_name="__main__", alter_sys=False)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0
