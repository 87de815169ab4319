"""Keeps every visual token and answers alone: the unpruned model a second time, the noise floor of a comparison.

Differs: nothing to differ from; a control. Each answer has a pass of its own, in no batch and shared with no variant,
so that what differs from the baseline is what batching and order of arithmetic change, and no pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ivcp_eval.interface import Faithfulness
from ivcp_eval.methods import none


@dataclass(frozen=True)
class Method(none.Method):
    """No cut at all, whatever the ratio."""

    faithfulness: ClassVar[Faithfulness] = "control"
    repeats_baseline: ClassVar[bool] = True
