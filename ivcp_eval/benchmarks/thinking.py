"""What a thinking model answers, apart from how it came to it."""

from __future__ import annotations

END = "</think>"


def split_thinking(text: str) -> tuple[str, str]:
    """(answer, thinking), as VLMEvalKit 0.0.20 splits the answers to every data set under SPLIT_THINK.

    The answer is what follows the last ``</think>``, whether or not a ``<think>`` comes before it (chat templates put
    that into the prompt). A text without one is an answer as a whole.
    """
    thinking, end, answer = text.rpartition(END)
    return (answer.strip(), thinking.removeprefix("<think>").strip()) if end else (text, "")
