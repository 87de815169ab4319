"""Keeps every visual token: the unpruned model through the same code path.

Differs: nothing to differ from; the control that every comparison is made against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ivcp_eval.interface import Faithfulness
from ivcp_eval.methods._uncut import Uncut


@dataclass(frozen=True)
class Method(Uncut):
    """No cut at all, whatever the ratio."""

    faithfulness: ClassVar[Faithfulness] = "control"
