"""Wordings that several families' published evaluations share."""

from __future__ import annotations

from collections.abc import Mapping


def letter_question(question: str, options: Mapping[str, str], hint: str = "") -> str:
    """Hint, question, lettered options, and the request for a letter (VLMEvalKit's LLaVA and InternVL classes)."""
    lines = [hint, question] if hint else [question]
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    lines.append(
        "Answer with the option's letter from the given choices directly."
        if options
        else "Answer the question directly."
    )
    return "\n".join(lines)
