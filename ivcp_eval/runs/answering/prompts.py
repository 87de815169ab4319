"""What was asked: the key of every row's prompt, noted once per (model, benchmark), so that scoring builds no prompts.

Answers are kept under the content hash of their prompt. The hash of a row is in small files that all variants of a
model share, one for each unit that was answered. They are a cache: a file that is missing or stale is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ivcp_eval.files import DAMAGE, DamagedError, read_json, write_json
from ivcp_eval.runs.planning.cells import Cell

if TYPE_CHECKING:
    from ivcp_eval.interface import AbstractAdapter
    from ivcp_eval.interface.records import Answer
    from ivcp_eval.vlmeval_bridge.evaluate import PromptRow


@dataclass
class Prompts:
    """Of the rows of a data set.

    Attributes:
        keys: index -> content hash of the prompt. pictures: index -> content hash of its images alone.
        broken: index -> what is kept of the failure (`failures.failure`), for rows whose prompt cannot be built, e.g.
            because of a corrupt image.
    """

    keys: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    broken: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Iterable[PromptRow]) -> Prompts:
        """From the prompts themselves."""
        prompts = cls()
        for row in rows:
            if row.message is None:
                prompts.broken[row.index] = dict(row.failure)
            else:
                prompts.keys[row.index], prompts.pictures[row.index] = row.key, row.pictures
        return prompts

    def note(self, cell: Cell, start: int, stop: int) -> None:
        """Keep them as those of the rows ``start`` to ``stop`` of a cell's model and benchmark."""
        path = _note(cell, start, stop)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, vars(self))

    @classmethod
    def load(cls, cell: Cell) -> Prompts:
        """Whatever is noted of a cell's model and benchmark. A row that could be read once is not broken."""
        prompts = cls()
        for path in sorted(_folder(cell).glob("*.json")):
            part = cls._read(path)
            prompts.keys |= part.keys
            prompts.pictures |= part.pictures
            prompts.broken |= part.broken
        prompts.broken = {index: why for index, why in prompts.broken.items() if index not in prompts.keys}
        return prompts

    @classmethod
    def keys_of(cls, cell: Cell, start: int, stop: int) -> set[str]:
        """Keys of the prompts of these rows, where they are noted."""
        return set(cls._read(_note(cell, start, stop)).keys.values())

    @classmethod
    def _read(cls, path: Path) -> Prompts:
        """What `note` wrote; nothing where the file is missing or damaged."""
        try:
            prompts = cls(**read_json(path, "it is made again"))
        except (FileNotFoundError, DamagedError, TypeError):
            return cls()
        texts = [vars(prompts)[name] for name in ("keys", "pictures")]
        whole = all(isinstance(part, dict) and all(map(_is_text, part.values())) for part in texts)
        return prompts if whole and _are_failures(prompts.broken) else cls()

    def fit(self, rows: Iterable[str], answers: Mapping[str, Answer]) -> bool:
        """Whether they cover ``rows`` (indices) and were those asked."""
        return all(index in self.broken or self.keys.get(index) in answers for index in rows)


def prompts_of(cell: Cell, dataset: Any, adapter: AbstractAdapter, answers: Mapping[str, Answer]) -> Prompts:
    """The prompts to which a cell's answers belong: those noted, or made again where they do not fit.

    Args:
        dataset: VLMEvalKit's, with the rows that count. adapter: of the model's family.
    """
    from ivcp_eval.vlmeval_bridge.evaluate import messages
    from ivcp_eval.vlmeval_bridge.model import Prompting

    prompts = Prompts.load(cell)
    if not prompts.fit((str(index) for index in dataset.data["index"]), answers):
        prompts = Prompts.of(messages(dataset, Prompting(adapter)))
        prompts.note(cell, 0, len(dataset.data))
    return prompts


def _note(cell: Cell, start: int, stop: int) -> Path:
    return _folder(cell) / f"{start:07d}-{stop:07d}.json"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_failures(value: Any) -> bool:
    from ivcp_eval.interface.records import Answer

    try:
        return all(Answer.from_json(failure).error for failure in value.values())
    except DAMAGE:
        return False


def _folder(cell: Cell) -> Path:
    identity = cell.identity
    content = json.dumps([identity.data, identity.prompt, identity.versions["vlmeval"], identity.video])
    return (
        cell.folder.parent / "prompts" / f"{identity.variant.model}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    )
