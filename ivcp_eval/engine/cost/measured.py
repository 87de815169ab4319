"""What an answer cost, from the tokens that each decoder layer was measured to process and to cache. No torch.

Answers keep the counts, not the shares: these are made whenever a record is, so a correction here needs no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ivcp_eval.engine.cost.flops import DecoderShape, sparse_flops


@dataclass(frozen=True)
class Shares:
    """Shares of the unpruned model in 0..1; None where the prompt has no visual tokens.

    Attributes:
        layer_mean: visual tokens processed in the prefill, mean over decoder layers.
        cached: visual tokens in the KV cache after the prefill, mean over decoder layers.
        flops: decoder FLOPs of the prefill; None also where the decoder's shape is not known.
        flops_analytic: what these would be if pairs of tokens and MLPs that a method leaves out were left out; None
            where it leaves out none.
    """

    layer_mean: float | None = None
    cached: float | None = None
    flops: float | None = None
    flops_analytic: float | None = None


def measured(
    whole: int,
    text: int,
    processed: Sequence[int],
    cached: Sequence[int],
    shape: DecoderShape | None,
    pairs: Sequence[int] = (),
    mlp: Sequence[int] = (),
) -> Shares:
    """The shares of one row.

    Args:
        whole: visual tokens of the unpruned prompt; of the picture as it was, where the method makes it smaller.
        text: the prompt's other tokens, which every layer processes.
        processed, cached: visual tokens in each decoder layer.
        pairs, mlp: of sparse layers, pairs of visual tokens that each one's attention looks at, and visual tokens that
            its MLP processes; the scores by which these are chosen are not counted, as everywhere.

    Raises:
        ValueError: the shape has another number of layers.
    """
    if not whole:
        return Shares()
    flops = analytic = None
    if shape is not None:
        unpruned = shape.prefill_flops([whole + text] * shape.layers)
        flops = round(shape.prefill_flops([visual + text for visual in processed]) / unpruned, 4)
        if pairs:
            analytic = round(sparse_flops(shape, text, processed, pairs, mlp) / unpruned, 4)
    return Shares(_mean(processed, whole), _mean(cached, whole), flops, analytic)


def _mean(tokens: Sequence[int], whole: int) -> float:
    return round(sum(tokens) / (whole * len(tokens)), 4)
