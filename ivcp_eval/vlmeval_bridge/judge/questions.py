"""What is put to a judge. Pure data; the wording comes from VLMEvalKit (`vlmeval_bridge.judging`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

from ivcp_eval.benchmarks.thinking import split_thinking


@dataclass(frozen=True)
class Question:
    """One answer to be rated.

    Attributes:
        template: name and version of the wording, e.g. ``mmvet/1``; raise the version when `parse` changes.
        prompt, system: what is sent.
        question, reference, prediction: what it is made of; together with the prompt they are the verdict's address.
        parse: the judge's reply as a verdict, or None if it cannot be read as one.
        max_tokens: length of the reply; one that is cut off there is asked for with more.
    """

    template: str
    prompt: str
    question: str
    reference: str
    prediction: str
    parse: Callable[[str], str | None]
    system: str = ""
    max_tokens: int = 16

    def key(self, judge: str) -> str:
        """SHA-256 of judge, template, wording, question, reference and prediction."""
        wording = hashlib.sha256(json.dumps([self.system, self.prompt]).encode()).hexdigest()
        content = [judge, self.template, wording, self.question, self.reference, self.prediction]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def messages(self) -> list[dict[str, str]]:
        """As the chat endpoint takes them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


def without_thinking(reply: str) -> str:
    """What a judge says after ``</think>``; nothing if it never stopped thinking."""
    said, _ = split_thinking(reply)
    return "" if "<think>" in said else said
