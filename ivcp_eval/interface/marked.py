"""YAML with the line of every value, so that an error can name it; bounded, and without what YAML 1.1 makes of words.

Numbers are JSON's: YAML 1.1 reads ``010`` as 8 and ``1:30`` as 90, which is refused, and ``1e-05``, which JSON writes,
as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ivcp_eval.files import DAMAGE, storable
from ivcp_eval.interface.registry import nearest

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000  # with those that an alias repeats
DEEPEST = 20
_LONGEST = 1000  # characters of a message

_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
_EXPONENT = re.compile(r"-?(0|[1-9][0-9]*)[eE][-+]?[0-9]+")
_TAG = "tag:yaml.org,2002:"

Place = tuple[Any, ...]
"""Keys and indices from the root to a value."""


class SpecError(ValueError):
    """What was asked for cannot be carried out; the message names the file and the line, where there is one."""


class Marked:
    """A YAML document and where its values stand, or values that come from a command line.

    Args:
        path: the file; None for ``value``, which stands in no file.
    """

    def __init__(self, path: Path | None, value: Any = None) -> None:
        self.path = path
        self.lines: dict[Place, int] = {}
        self._scalars = yaml.SafeLoader("")
        self._count = 0
        self.value = value if path is None else self._read(path)

    def _read(self, path: Path) -> Any:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise self._wrong(1, f"the file has {size} bytes, more than {MOST_BYTES}; it is no file of this kind")
        content = path.read_bytes()
        try:
            text = content.decode()
            loader = _Loader(text)
            node = loader.get_single_node()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise self._wrong(line, f"byte 0x{content[error.start]:02x} is not UTF-8 text; save it as UTF-8") from None
        except yaml.reader.ReaderError as error:  # a character that no text file has
            line = text.count("\n", 0, error.position) + 1
            raise self._wrong(line, f"not YAML: {error.reason}") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise self._wrong(line, f"not YAML: {error.problem}") from None
        except (ValueError, OverflowError) as error:  # an escape that stands for no character
            raise self._wrong(loader.line + 1, f"not YAML: {error}") from None
        return self._convert(node, ()) if node is not None else None

    def _wrong(self, line: int, text: str) -> SpecError:
        more = "..." if len(text) > _LONGEST else ""  # what was got may be anything
        return SpecError(f"{self.path}, line {line}: {text[:_LONGEST]}{more}")

    def error(self, place: Place, text: str) -> SpecError:
        """The error to raise for what stands at a place."""
        if self.path is None:
            return SpecError(text)
        while place not in self.lines and place:
            place = place[:-1]
        return self._wrong(self.lines.get(place, 1), text)

    def keys(self, place: Place, value: Any, allowed: Iterable[str]) -> Mapping[str, Any]:
        """The mapping at a place; raises SpecError if it is none or has another key."""
        allowed = list(allowed)
        if not isinstance(value, Mapping):
            raise self.error(place, f"expected a mapping with {', '.join(allowed)}, got {value!r}")
        for key in value:
            if key not in allowed:
                raise self.error(
                    (*place, key), f"unknown key {key!r}{nearest(str(key), allowed)} Allowed: {', '.join(allowed)}."
                )
        return value

    def listed(self, place: Place, value: Any, kind: Any, what: str, repeats: bool = False) -> list[Any]:
        """The list at a place, a single value being a list of one.

        Raises:
            SpecError: a member of another kind, or, unless ``repeats``, one that stands there twice.
        """
        values = value if isinstance(value, list) else [value]
        for i, entry in enumerate(values):
            if not isinstance(entry, kind) or isinstance(entry, bool):
                raise self.error((*place, i), f"{entry!r} is not {what}")
            if not repeats and entry in values[:i]:
                raise self.error((*place, i), f"{entry!r} stands here twice; remove one")
        return values

    def _convert(self, node: yaml.Node, place: Place) -> Any:
        line = self.lines[place] = node.start_mark.line + 1
        self._count += 1
        if self._count > MOST_VALUES or len(place) > DEEPEST:  # aliases repeat what they stand for, and may repeat it
            raise self._wrong(line, f"more than {MOST_VALUES} values, or {DEEPEST} within one another; write less")
        if isinstance(node, yaml.MappingNode):
            mapping: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise self._wrong(line, "a key must be a word")
                key = self._scalar(key_node)
                if key in mapping:
                    raise self._wrong(line, f"key {key!r} stands here twice")
                mapping[key] = self._convert(value_node, (*place, key))
                self.lines[(*place, key)] = line
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._convert(child, (*place, i)) for i, child in enumerate(node.value)]
        return self._scalar(node)

    def _scalar(self, node: Any) -> Any:
        line, text, kind = node.start_mark.line + 1, node.value, node.tag.removeprefix(_TAG)
        try:
            value = self._scalars.construct_object(node, deep=True)
            if kind == "str" and not node.style and _EXPONENT.fullmatch(text):
                value = float(text)
        except yaml.MarkedYAMLError as error:
            raise self._wrong(line, f"not a plain value: {error.problem}") from None
        except DAMAGE as error:
            raise self._wrong(line, f"{text[:40]!r} is no {kind}: {error}") from None
        if kind in ("int", "float") and not _NUMBER.fullmatch(text):
            raise self._wrong(line, f"{text!r} is {value} to YAML 1.1; write {value}, or quotes around it for text")
        if isinstance(value, str) and storable(value) != value:
            raise self._wrong(line, f"{value[:40]!r} holds half a character (a lone surrogate); write the whole one")
        if not isinstance(value, str | int | float | None):
            raise self._wrong(line, f"{text[:40]!r} is a {type(value).__name__} to YAML; write quotes around it")
        return value


class _Loader(yaml.SafeLoader):
    """Goes no deeper than is allowed, where each level would be one of Python's own."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST} values within one another", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node
