"""Import VLMEvalKit without letting its import reach beyond what it needs."""

from __future__ import annotations

import importlib.util
import logging
import os
import ssl
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from ivcp_eval.files import commit_file, file_digest
from ivcp_eval.files import data_root as data_root

MISSING = (
    "VLMEvalKit is not installed. In a checkout `make setup` installs the tested set; elsewhere: "
    'pip install "ivcp-eval[vlmeval]" && pip install --no-deps ms-vlmeval==0.0.20'
)


def import_vlmeval() -> None:
    """Import VLMEvalKit once and undo its process-wide side effects.

    Its import turns TLS verification off for urllib, turns gradients off, reseeds torch, configures the root logger
    and overwrites environment variables; the first four are put back. What it reports of a missing ``.env`` file, and
    warnings of what it imports, are held back. LLaVABench's evaluator imports a module path
    that does not exist in either tree (``vlmeval.dataset.smp``); the alias makes it work without editing a file.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    if "vlmeval" in sys.modules and hasattr(sys.modules["vlmeval"], "dataset"):
        _mend()  # somebody else may have imported it
        return
    if importlib.util.find_spec("vlmeval") is None:
        raise ImportError(MISSING)
    import torch

    from ivcp_eval.vlmeval_bridge import cpu_torchvision

    cpu_torchvision.install()
    context, grad = ssl._create_default_https_context, torch.is_grad_enabled()
    state, handlers = torch.get_rng_state(), list(logging.getLogger().handlers)
    level = logging.getLogger().level
    logging.getLogger().addFilter(_is_news)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_module("vlmeval.dataset")
    finally:
        logging.getLogger().removeFilter(_is_news)
        ssl._create_default_https_context = context
        torch.set_grad_enabled(grad)
        torch.set_rng_state(state)
        logging.getLogger().handlers[:] = handlers
        logging.getLogger().setLevel(level)
    _mend()


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record is news: keys of judges come from elsewhere here, so no ``.env`` file is no error."""
    return not record.getMessage().startswith("Did not detect the .env file")


def _mend() -> None:
    sys.modules.setdefault("vlmeval.dataset.smp", sys.modules["vlmeval.smp"])
    sys.modules.setdefault("vlmeval.dataset.smp.log", sys.modules["vlmeval.smp.log"])
    # Its judge wrapper logs the API key in clear text.
    logging.getLogger("vlmeval.api.gpt").setLevel(logging.WARNING)


@contextmanager
def lossless_files() -> Iterator[None]:
    """Have VLMEvalKit write TSV predictions while the block runs (its only switch is the environment).

    The default, xlsx, evaluates cells like ``=1+1`` and cuts long answers; json breaks most evaluators.
    """
    before = {name: os.environ.get(name) for name in ("PRED_FORMAT", "EVAL_FORMAT")}
    os.environ["PRED_FORMAT"], os.environ["EVAL_FORMAT"] = "tsv", "csv"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def wrong_checksum(path: Path, got: str, expected: str) -> str:
    """What is said of a file of VLMEvalKit's name that is not VLMEvalKit's file, which would download over it."""
    return (
        f"{path} has MD5 {got}, VLMEvalKit notes {expected}: it was changed, cut short, or is another version. It is "
        "left untouched and not used. Move it away and fetch the noted file (`ivcp data prepare NAME`), or give your "
        "own version a name of its own"
    )


def check_folder(path: Path) -> None:
    """Raise ValueError for a folder in which VLMEvalKit misplaces its files: it fills in braces and swaps endings."""
    for text in ("{", "}", ".pkl", ".tsv"):
        if text in str(path):
            raise ValueError(f"VLMEvalKit cannot work below {path}: the path holds {text!r}; choose another (--runs)")


def download(url: str, path: Path) -> str:
    """VLMEvalKit's download of one file; why it failed, or nothing. TLS certificates are verified."""
    import_vlmeval()
    fetch = import_module("vlmeval.smp").download_file
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it warns of the error by its type, before it raises it; we say which and what to do
    try:
        fetch(url, str(path))
    except Exception as error:  # VLMEvalKit raises nothing more precise
        return f"{type(error).__name__}: {error}"
    finally:
        root.setLevel(level)
    return ""


def fetch(url: str, md5: str, path: Path) -> str:
    """VLMEvalKit's download, to a temporary name; why there is no file now, or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        problem = download(url, part)
        if problem:
            return f"{url} could not be fetched ({problem}); fetch it by hand and put it at {path}"
        got = file_digest(part, "md5")
        if md5 and got != md5:
            return f"{url} gave a file with MD5 {got}, VLMEvalKit notes {md5}; not kept"
        commit_file(part, path)
        return ""
    finally:
        part.unlink(missing_ok=True)


def stock_address(name: str) -> tuple[str, str]:
    """(URL, MD5) that VLMEvalKit notes for one of its own data sets."""
    import_vlmeval()
    classes = import_module("vlmeval.dataset").DATASET_CLASSES
    owner = next(cls for cls in classes if name in getattr(cls, "DATASET_URL", {}))
    return str(owner.DATASET_URL[name]), str(owner.DATASET_MD5.get(name) or "")
