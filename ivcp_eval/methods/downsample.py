"""Shrinks the image itself, before the processor, until it costs the share of visual tokens.

Paper: https://arxiv.org/abs/2510.07143 (VTC-Bench: plain down-sampling beats several pruning methods).
Differs: nothing to differ from; a control. The size comes from the family (`AbstractAdapter.shrunk_size`);
`model_adapters._shrink.shrink` applies it, before and outside of the model. At native resolution (Qwen) almost any
share can be had. Tiled families have few prices (LLaVA-NeXT: a 4:3 image at least 0.58; InternVL: an image of one tile
always 1): an image that costs more than the share at any size is taken at its cheapest, and the row counts such samples
in `reason`, their tokens in the measured columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ivcp_eval.interface import Faithfulness
from ivcp_eval.methods._uncut import Uncut


@dataclass(frozen=True)
class Method(Uncut):
    """A smaller image; the model runs whole on it."""

    faithfulness: ClassVar[Faithfulness] = "control"

    def pixel_share(self, ratio: float) -> float | None:
        """The retention ratio itself."""
        return ratio
