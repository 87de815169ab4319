"""Keeps every visual token and answers alone: the unpruned model a second time, the noise floor of a comparison.

Differs: nothing to differ from; a control. Each answer has a pass of its own, in no batch and shared with no variant,
so that what differs from the baseline is what batching and order of arithmetic change, and no pruning. With ``dtype``
or ``attention`` the model is loaded a second time in that data type or with that kernel: what a change of them alone
does to the answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ivcp_eval.interface import Faithfulness
from ivcp_eval.interface.variants import ATTENTIONS, DTYPES
from ivcp_eval.methods import none


@dataclass(frozen=True)
class Method(none.Method):
    """No cut at all, whatever the ratio.

    Attributes:
        dtype, attention: of the second answers, e.g. "bfloat16" and "eager"; empty: as the first ones'.

    Raises:
        ValueError: another name.
    """

    faithfulness: ClassVar[Faithfulness] = "control"
    repeats_baseline: ClassVar[bool] = True
    dtype: str = ""
    attention: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("attention", ATTENTIONS)):
            if getattr(self, name) not in ("", *allowed):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} of method 'again' must be one of {', '.join(allowed)}; leave it "
                    "out for the run's own"
                )

    @property
    def loading(self) -> Mapping[str, str]:
        """Those that were given."""
        return {name: value for name in ("dtype", "attention") if (value := getattr(self, name))}
