"""How a run is made: one field for each key of a sweep file that is also a flag of ``ivcp eval``. No torch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ivcp_eval.benchmarks.clips import Sampling
from ivcp_eval.interface.variants import ATTENTIONS, DTYPES, parameter
from ivcp_eval.runs.planning.numbers import INDEX, Number
from ivcp_eval.vlmeval_bridge.judge.config import check_options

__all__ = ["TIMED_SAMPLES", "Options", "add_flags", "check", "given_flags"]

TIMED_SAMPLES = 16


def _option(default: Any, kind: type, help: str, **more: Any) -> Any:  # noqa: A002 (argparse's word)
    """A field; ``more`` holds ``choices``, ``metavar``, or ``number``, which numbers are allowed (default: above 0)."""
    if kind in (int, float):
        more.setdefault("number", Number(kind))
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help, **more})


@dataclass(frozen=True)
class Options:
    """Settings of a run. Empty text and None are to be found: by the checkpoint, the family, or the machine."""

    limit: int | None = _option(None, int, "only the first N rows of each benchmark", metavar="N")
    judge: str = _option(
        "", str, "judge model, or exact_matching; default: gpt-4o where a benchmark needs a judge", metavar="NAME"
    )
    judge_url: str = _option(
        "", str, "the judge's OpenAI-compatible endpoint (default: $OPENAI_BASE_URL, else OpenAI's)", metavar="URL"
    )
    judge_options: Mapping[str, Any] | None = _option(
        None, dict, "fields of the judge's requests, e.g. max_completion_tokens=4096 temperature=None "
        "(sent without) reasoning_effort=low; default: temperature 0, and as many tokens as a verdict needs. A judge "
        "that refuses max_tokens or temperature is asked without", metavar="KEY=VALUE",
    )  # fmt: skip
    device: str = _option("", str, "cuda, cuda:1, cpu, or auto for all GPUs; default: cuda if there is one")
    dtype: str = _option("", str, "default: bfloat16 on a GPU, float32 on a CPU", choices=DTYPES)
    attention: str = _option("", str, "default: the fastest installed", choices=ATTENTIONS)
    min_pixels: int | None = _option(None, int, "default: the family's published limit", metavar="N")
    max_pixels: int | None = _option(None, int, "default: the family's published limit", metavar="N")
    max_new_tokens: int | None = _option(None, int, "default: the family's published limit", metavar="N")
    nframe: int | None = _option(None, int, "frames of every video (default: what its benchmark says)", metavar="N")
    fps: float | None = _option(None, float, "frames of every second of video, in place of --nframe", metavar="N")
    batch: int | None = _option(
        None, int, "samples of about equal length answered together (default: as many as fit, at most 4 on a CPU)"
    )
    exact: bool = _option(
        False, bool, "one variant and one sample at a time; answers made together are made again (for half precision)"
    )
    timing: int = _option(
        TIMED_SAMPLES, int, "samples of each benchmark that are timed under every variant once it is answered; 0: "
        "none, and no dates either, so that equal runs are equal bytes (default: %(default)s)",
        metavar="N", number=INDEX,
    )  # fmt: skip
    timeout: float | None = _option(
        None, float, "seconds that one answer may take; a late one is an error of its sample, "
        "which `eval` and `sweep run --retry-failed` "
        "tries again (default: no limit but --max-new-tokens)", metavar="S",
    )  # fmt: skip
    shard: int = _option(200, int, "rows that a worker takes at once", metavar="N")
    trust_remote_code: bool = _option(False, bool, "allow a checkpoint's own code to run")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) != field.default:
                check(field.name, getattr(self, field.name))
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        if self.nframe and self.fps:
            raise ValueError(
                f"fps {self.fps} and nframe {self.nframe} both say which frames are shown; give one of them"
            )

    @property
    def sampling(self) -> Sampling | None:
        """Which frames of videos were asked for; None: what their benchmarks say."""
        return Sampling(self.nframe or 0, self.fps or 0.0) if self.nframe or self.fps else None


_FIELDS = {field.name: field for field in dataclasses.fields(Options)}
_WORDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    dict: "KEY: VALUE",
}


def check(name: str, value: Any) -> Any:
    """The value of one option, if it may be; ``timing`` also takes true and false.

    Raises:
        ValueError: what is allowed.
    """
    meta = _FIELDS[name].metadata
    kind: type = meta["kind"]
    if name == "timing" and isinstance(value, bool):
        return TIMED_SAMPLES if value else 0
    choices = meta.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    number = meta.get("number")
    if not (number.fits(value) if number else isinstance(value, kind)):
        raise ValueError(f"{name} must be {number or _WORDS[kind]}, got {value!r}")
    if kind is dict:
        check_options(value)
    return value


def add_flags(parser: argparse.ArgumentParser, names: Collection[str] = tuple(_FIELDS), default: str = "") -> None:
    """Add ``--limit`` and the like; a flag that is not given is None, so that a file's own value stands.

    Args:
        default: what stands for a default in the help, where it is not the field's own.
    """
    for name in names:
        field = _FIELDS[name]
        meta = field.metadata
        text = meta["help"].replace("%(default)s", default or str(field.default))
        flag = "--" + name.replace("_", "-")
        if meta["kind"] is bool:
            parser.add_argument(flag, action="store_true", default=None, help=text)
        elif meta["kind"] is dict:
            parser.add_argument(flag, nargs="+", action=_Pairs, metavar=meta["metavar"], help=text)
        else:
            shown = meta.get("metavar") or ("{" + ",".join(meta["choices"]) + "}" if "choices" in meta else None)
            parser.add_argument(flag, type=meta.get("number") or _checked(name), metavar=shown, help=text)
        if name == "timing":
            parser.add_argument("--no-timing", dest="timing", action="store_const", const=0, help="as --timing 0")


class _Pairs(argparse.Action):
    """``KEY=VALUE ...`` as a mapping."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        try:
            setattr(namespace, self.dest, check(self.dest, dict(parameter(text) for text in values)))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def _checked(name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return check(name, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def given_flags(args: argparse.Namespace, names: Collection[str] = tuple(_FIELDS)) -> Mapping[str, Any]:
    """The options that a command line gave."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}
