"""YAML with the line of every value, so that an error can name it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ivcp_eval.interface.registry import nearest

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
        self.value = value if path is None else self._read(path)

    def _read(self, path: Path) -> Any:
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise SpecError(f"{path}, line {line}: not YAML: {error.problem}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:  # a character that no text file has
            raise SpecError(f"{path}, line 1: not YAML: {' '.join(str(error).split())}") from None
        return self._convert(node, ()) if node is not None else None

    def error(self, place: Place, text: str) -> SpecError:
        """The error to raise for what stands at a place."""
        if self.path is None:
            return SpecError(text)
        while place not in self.lines and place:
            place = place[:-1]
        return SpecError(f"{self.path}, line {self.lines.get(place, 1)}: {text}")

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
        self.lines[place] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            mapping: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                if not isinstance(key_node, yaml.ScalarNode):
                    raise SpecError(f"{self.path}, line {key_node.start_mark.line + 1}: a key must be a word")
                key = self._scalar(key_node)
                if key in mapping:
                    raise SpecError(f"{self.path}, line {key_node.start_mark.line + 1}: key {key!r} stands here twice")
                mapping[key] = self._convert(value_node, (*place, key))
                self.lines[(*place, key)] = key_node.start_mark.line + 1
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._convert(child, (*place, i)) for i, child in enumerate(node.value)]
        return self._scalar(node)

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return yaml.SafeLoader("").construct_object(node, deep=True)
        except yaml.YAMLError as error:
            raise SpecError(f"{self.path}, line {node.start_mark.line + 1}: {error}") from None
