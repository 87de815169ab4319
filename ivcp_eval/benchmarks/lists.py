"""Answers that are lists: how much of the true list an answer holds, in order."""

from __future__ import annotations

import re


def items(text: str) -> list[str]:
    """The parts of a text between commas and line ends, lower case, without outer spaces and full stops."""
    parts = (part.strip(" .\t").lower() for part in re.split(r"[,\n]", text))
    return [part for part in parts if part]


def in_order(given: str, truth: str) -> float:
    """Longest common subsequence of the items, as a share of the longer list; 0..1.

    One item too many, one too few and two that changed places each cost one item's share.
    """
    answered, expected = items(given), items(truth)
    if not answered or not expected:
        return float(answered == expected)
    above = [0] * (len(expected) + 1)
    for one in answered:
        row = [0]
        for j, other in enumerate(expected):
            row.append(above[j] + 1 if one == other else max(above[j + 1], row[j]))
        above = row
    return above[-1] / max(len(answered), len(expected))
