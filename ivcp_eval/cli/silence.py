"""What libraries warn of is neither a result nor an error: under ``--quiet`` they do not say it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_LIBRARIES = ("transformers", "huggingface_hub", "torch", "vlmeval", "py.warnings")
#: transformers sets the level of its logger by this when it is imported, which may be later.
_VERBOSITY = "TRANSFORMERS_VERBOSITY"


@contextmanager
def without_warnings(quiet: bool) -> Iterator[None]:
    """Hold back the warnings of libraries if ``quiet``; their errors, and our own words, pass through."""
    if not quiet:
        yield
        return
    levels = {logger: logger.level for logger in map(logging.getLogger, _LIBRARIES)}
    verbosity = os.environ.get(_VERBOSITY)
    os.environ[_VERBOSITY] = "error"
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if verbosity is None:
            del os.environ[_VERBOSITY]
        else:
            os.environ[_VERBOSITY] = verbosity
