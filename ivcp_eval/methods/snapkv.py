"""Keeps, in every layer's cache and head, the visual tokens that the question's last tokens attend to, with neighbours.

Paper: https://arxiv.org/abs/2404.14469 (section 4: voting by an observation window, pooling of the votes).
Reference: https://github.com/FasterDecoding/SnapKV @ 395b54d (snapkv/monkeypatch/snapkv_utils.py)

The prompt is processed whole. Then, in each layer, the attention of the last ``window`` tokens (softmax over the whole
prompt) is summed over them, smoothed along the sequence by a mean over ``kernel`` tokens, and the best tokens of each
head stay. The others leave the cache for good: memory is freed, the prefill costs what it costs unpruned.

Differs: only visual tokens leave, all text stays; the released code evicts text too, and its capacity is a number of
tokens, here a share of each image. The window is the last of the tokens behind the last image, so that no visual token
is in it, and votes are smoothed inside an image. Where several query heads read one key head, they vote by their mean;
the released code repeats the keys for each of them first. Votes are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ivcp_eval.interface import Faithfulness, Signals
from ivcp_eval.methods._evicting import Evictor


@dataclass(frozen=True)
class Method(Evictor):
    """SnapKV.

    Attributes:
        window: tokens that vote. kernel: odd number of neighbours whose votes are averaged; 1 for none.
    """

    faithfulness: ClassVar[Faithfulness] = "variant"

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        """Refuse sizes that no run can mean."""
        super().__post_init__()
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"window={self.window} must be 1 or more, kernel={self.kernel} an odd number of 1 or more")

    def weigh(self, signals: Signals) -> Tensor:
        """Smoothed votes of the window."""
        votes = signals.attention(signals.question[-self.window :])[:, :, signals.visual].sum(dim=1)  # (H, V)
        smooth = torch.empty_like(votes)
        for image in signals.images:
            smooth[:, image.tokens] = torch.nn.functional.avg_pool1d(
                votes[:, image.tokens], self.kernel, stride=1, padding=self.kernel // 2
            )
        return smooth
