"""Whatever a server does that was started to prune (vLLM, OpenVINO, TensorRT Edge-LLM): measured as it is deployed.

Differs: nothing of it runs here. Its ratio is what the user says the server was started with; what it really keeps
shows in the prompt tokens that it reports, if at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ivcp_eval.interface import Faithfulness
from ivcp_eval.methods._uncut import Uncut


@dataclass(frozen=True)
class Method(Uncut):
    """No cut here, whatever the ratio; a sweep wants ``served`` beside it, `ivcp eval` wants ``--base-url``."""

    faithfulness: ClassVar[Faithfulness] = "variant"
    is_served: ClassVar[bool] = True
