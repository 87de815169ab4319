"""Keeps, in every layer's cache and head, the visual tokens that the question's last tokens attend to, with neighbours.

Paper: https://arxiv.org/abs/2404.14469 (section 4: voting by an observation window, pooling of the votes).
Reference: https://github.com/FasterDecoding/SnapKV @ e216ddc (snapkv/monkeypatch/snapkv_utils.py)

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

from ivcp_eval.interface import Faithfulness
from ivcp_eval.methods._evicting import Voting


@dataclass(frozen=True)
class Method(Voting):
    """SnapKV; the defaults of its fields are the released ones."""

    faithfulness: ClassVar[Faithfulness] = "variant"
