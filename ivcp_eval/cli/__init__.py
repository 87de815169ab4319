"""The ``ivcp`` command: one file a verb, found by its name in the folders beside this file.

A verb's file begins with one sentence, which is its help, and offers ``add_arguments(parser)`` and
``run(args) -> int``. Nothing of a verb is imported before it is asked for, and a verb imports what is heavy when it
runs, so that ``--help`` and ``list`` stay light. ``FOREIGN = True``: its options belong to another parser;
its ``run`` finds them in ``args.further``.

Every verb has ``--quiet`` (`add_common`): only results and errors are printed; the rest goes through `notices`.
"""

from __future__ import annotations

import argparse
import ast
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TextIO

import ivcp_eval
from ivcp_eval.cli.bars import bars_on_terminals_only
from ivcp_eval.cli.silence import without_warnings
from ivcp_eval.vlmeval_bridge import cpu_torchvision

_QUIET = "print results and errors only"
GROUPS = {
    "running": "run models",
    "results": "read results",
    "setup": "models, data and methods",
    "lab": "work on ivcp-eval itself",
}


def verbs() -> dict[str, str]:
    """Verb -> its module, group by group."""
    modules = {}
    for group in GROUPS:
        for path in sorted((Path(__file__).parent / group).glob("[a-z]*.py")):
            modules[path.stem.replace("_", "-")] = f"ivcp_eval.cli.{group}.{path.stem}"
    return modules


#: Loggers that warn of what they miss as soon as transformers loads them, whether anyone uses them or not.
_TALKATIVE = ("torchao", "torch.utils._pytree")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 some cells are not whole, 2 the request cannot be carried out."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = verbs()
    if not arguments or arguments[0] not in known:
        return _guarded(lambda: _help(known, arguments))
    return _guarded(lambda: _run(known[arguments[0]], arguments))


def _help(known: dict[str, str], arguments: Sequence[str]) -> int:
    parser = _overview(known)
    parser.parse_args(arguments)
    parser.print_help(sys.stderr)
    return 2


def _run(module_name: str, arguments: Sequence[str]) -> int:
    module = import_module(module_name)
    parser = argparse.ArgumentParser(prog=f"ivcp {arguments[0]}", description=(module.__doc__ or "").split("\n\n")[0])
    module.add_arguments(parser)
    add_common(parser)
    parser.set_defaults(quiet=False)
    rest, foreign = arguments[1:], getattr(module, "FOREIGN", False)
    args = _foreign(rest) if foreign and rest[:1] not in (["-h"], ["--help"]) else parser.parse_args(rest)
    for library in _TALKATIVE:
        logging.getLogger(library).setLevel(logging.ERROR)
    cpu_torchvision.install()  # before a verb, in whatever order, imports transformers
    with bars_on_terminals_only(args.quiet), without_warnings(args.quiet):
        try:
            return int(module.run(args))
        except SystemExit as stop:
            if foreign:  # of its own parser
                if {"-h", "--help"} & {*args.further}:
                    say(f"\nof every verb:\n  --quiet  {_QUIET}")
                raise
            say(
                f"ivcp: a plug-in or library asked the program to end (SystemExit: {stop.code}); it did not", sys.stderr
            )
            return 2


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once."""
    print(text, file=stream or sys.stdout, flush=True)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every verb; `main` adds them, and a verb with verbs of its own adds them to each."""
    # Nothing is set where it is not given, or a verb's own verb would undo it: `ivcp sweep --quiet run FILE`.
    parser.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help=_QUIET)


def notices(args: argparse.Namespace) -> Callable[[str], None]:
    """What prints a line that is neither a result nor an error: `say`, or nothing under ``--quiet``."""
    return (lambda text: None) if args.quiet else say


def _foreign(words: Sequence[str]) -> argparse.Namespace:
    """Options of another program, which argparse would not hand on by itself; ``--quiet`` before a ``--`` is ours."""
    end = words.index("--") if "--" in words else len(words)
    further = [*(word for word in words[:end] if word != "--quiet"), *words[end + 1 :]]
    return argparse.Namespace(quiet="--quiet" in words[:end], further=further)


def _overview(known: dict[str, str]) -> argparse.ArgumentParser:
    lines = []
    for group, title in GROUPS.items():
        lines.append(f"{title}:")
        for verb, module in known.items():
            if module.split(".")[2] == group:
                lines.append(f"    {verb:<14}{_first_sentence(module)}")
    parser = argparse.ArgumentParser(
        prog="ivcp",
        description=(ivcp_eval.__doc__ or "").split("\n")[0],
        usage="ivcp VERB ...",
        epilog="\n".join(lines) + "\n\n`ivcp VERB --help` says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ivcp-eval {ivcp_eval.__version__}")
    parser.add_argument("verb", choices=list(known), metavar="VERB", help="one of those below")
    return parser


def _first_sentence(module: str) -> str:
    path = Path(__file__).parent.joinpath(*module.split(".")[2:]).with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).rstrip(".")


def _guarded(verb: Callable[[], int]) -> int:
    from ivcp_eval.files import NO_SPACE, DiskFullError
    from ivcp_eval.interface.models import MissingWeights

    try:
        try:
            return verb()
        finally:
            sys.stdout.flush()  # also what `--help` printed
    except BrokenPipeError as error:
        if _is_read():
            say(f"ivcp: {type(error).__name__}: {error}", sys.stderr)  # another pipe, to a process of ours
            return 2
        return 0  # the reader has seen enough: `ivcp list | head`
    except (ValueError, MissingWeights, FileNotFoundError, ImportError) as error:
        say(f"ivcp: {error}", sys.stderr)
    except OSError as error:
        if isinstance(error, IsADirectoryError):
            say(f"ivcp: a folder stands where a file belongs: {error.filename}; move it away", sys.stderr)
        elif error.errno in NO_SPACE and not isinstance(error, DiskFullError):  # of a library that wrote, or of `print`
            _drop_output()
            say(
                f"ivcp: the disk (or quota, or limit of file sizes) is full: {error}; free some space and run the same "
                "command again: what was finished is kept",
                sys.stderr,
            )
        else:
            say(f"ivcp: {type(error).__name__}: {error}", sys.stderr)
    except RuntimeError as error:
        say(f"ivcp: {type(error).__name__}: {error}", sys.stderr)
    except KeyboardInterrupt:
        say("ivcp: interrupted; run the same command again to continue", sys.stderr)
        return 130
    return 2


def _is_read() -> bool:
    """Whether anybody still reads standard output; if not, what is left goes nowhere, with no complaint at the end."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    if not pipe.poll(0):
        return True
    _discard_output()
    return False


def _drop_output() -> None:
    """Throw away what standard output still holds, or the interpreter complains about it at its end."""
    with suppress(OSError, ValueError):  # no file, as in a test or a notebook
        sys.stdout.flush()
        return
    _discard_output()


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
