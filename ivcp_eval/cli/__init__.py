"""The ``ivcp`` command: one file a verb, found by its name in the folders beside this file.

A verb's file begins with one sentence, which is its help, and offers ``add_arguments(parser)`` and
``run(args) -> int``. Nothing of a verb is imported before it is asked for, and a verb imports what is heavy when it
runs, so that ``--help`` and ``list`` stay light. ``FOREIGN = True``: its options belong to another parser;
its ``run`` finds them in ``args.further``.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TextIO

import ivcp_eval

GROUPS = {
    "running": "run models",
    "results": "read results",
    "setup": "models, data and methods",
    "lab": "work on ivcp-eval itself",
}


def verbs() -> dict[str, str]:
    """Verb -> its module, group by group."""
    found = {}
    for group in GROUPS:
        for path in sorted((Path(__file__).parent / group).glob("[a-z]*.py")):
            found[path.stem.replace("_", "-")] = f"ivcp_eval.cli.{group}.{path.stem}"
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 some cells are not whole, 2 the request cannot be carried out."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    known = verbs()
    if not arguments or arguments[0] not in known:
        parser = _overview(known)
        parser.parse_args(arguments)
        parser.print_help(sys.stderr)
        return 2
    module = import_module(known[arguments[0]])
    parser = argparse.ArgumentParser(prog=f"ivcp {arguments[0]}", description=(module.__doc__ or "").split("\n\n")[0])
    module.add_arguments(parser)
    rest = arguments[1:]
    if getattr(module, "FOREIGN", False) and rest[:1] not in (["-h"], ["--help"]):
        # Options of another program, which argparse would not hand on by itself.
        args = argparse.Namespace(further=rest[1:] if rest[:1] == ["--"] else rest)
    else:
        args = parser.parse_args(rest)
    return _guarded(lambda: int(module.run(args)), foreign=getattr(module, "FOREIGN", False))


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line at once."""
    print(text, file=stream or sys.stdout, flush=True)


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


def _guarded(verb: Callable[[], int], foreign: bool) -> int:
    from ivcp_eval.files import NO_SPACE, DiskFullError
    from ivcp_eval.interface.models import MissingWeights

    try:
        code = verb()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough: `ivcp list | head`
        _drop_output()
        return 0
    except (ValueError, MissingWeights, FileNotFoundError, ImportError) as error:
        say(f"ivcp: {error}", sys.stderr)
    except OSError as error:
        if error.errno in NO_SPACE and not isinstance(error, DiskFullError):  # of a library that wrote, or of `print`
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
    except SystemExit as stop:
        if foreign:  # of its own parser
            raise
        say(f"ivcp: a plug-in or library asked the program to end (SystemExit: {stop.code}); it did not", sys.stderr)
    else:
        return code
    return 2


def _drop_output() -> None:
    """Throw away what standard output still holds, or the interpreter complains about it at its end."""
    with suppress(OSError, ValueError):  # no file, as in a test or a notebook
        sys.stdout.flush()
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
