"""Rating answers with a language model: one client, one cache, and errors that cannot be mistaken for scores.

A judge that cannot be reached, refuses, or answers nonsense raises `JudgeError`; its place is never taken by string
matching or chance. Every verdict is kept in a cache that all runs share. See docs/design/judge.md.
"""

from __future__ import annotations

from ivcp_eval.vlmeval_bridge.judge.cache import VerdictCache
from ivcp_eval.vlmeval_bridge.judge.client import (
    Judge,
    JudgeError,
    JudgeRateLimited,
    JudgeRefused,
    JudgeUnreachable,
    JudgeUnusable,
)
from ivcp_eval.vlmeval_bridge.judge.config import DEFAULT, EXACT_MATCHING, JudgeConfig, cache_folder, judge_for
from ivcp_eval.vlmeval_bridge.judge.estimate import Estimate, estimate
from ivcp_eval.vlmeval_bridge.judge.questions import Question

__all__ = [
    "DEFAULT",
    "EXACT_MATCHING",
    "Estimate",
    "Judge",
    "JudgeConfig",
    "JudgeError",
    "JudgeRateLimited",
    "JudgeRefused",
    "JudgeUnreachable",
    "JudgeUnusable",
    "Question",
    "VerdictCache",
    "cache_folder",
    "estimate",
    "judge_for",
]
