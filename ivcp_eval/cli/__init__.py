"""The ``ivcp`` command: one file a verb, found by its name in the folders beside this file.

A verb's file begins with one sentence, which is its help, and offers ``add_arguments(parser)`` and
``run(args) -> int``. Nothing of a verb is imported before it is asked for, and a verb imports what is heavy when it
runs, so that ``--help`` and ``list`` stay light. ``FOREIGN = True``: its options belong to another parser;
its ``run`` finds them in ``args.further``.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

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
    return _guarded(lambda: int(module.run(args)))


def parameter(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` of a command line; a value that is no JSON is text. Raises ValueError without ``=``."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"parameter {text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, {"True": True, "False": False, "None": None}.get(value, value)


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


def _guarded(verb: Callable[[], int]) -> int:
    from ivcp_eval.interface.models import MissingWeights

    try:
        code = verb()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough: `ivcp list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 0
    except (ValueError, MissingWeights, FileNotFoundError, ImportError) as error:
        say(f"ivcp: {error}", sys.stderr)
    except (OSError, RuntimeError) as error:
        say(f"ivcp: {type(error).__name__}: {error}", sys.stderr)
    except KeyboardInterrupt:
        say("ivcp: interrupted; run the same command again to continue", sys.stderr)
        return 130
    else:
        return code
    return 2
