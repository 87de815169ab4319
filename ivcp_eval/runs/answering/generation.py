"""What `generate` is told: nothing that a checkpoint's generation_config.json sets but its token ids, and no NaN."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class NonFiniteLogits(ArithmeticError):
    """The model gave logits that are NaN or infinite, from which no token can be chosen."""


def neutral(checkpoints: GenerationConfig) -> GenerationConfig:
    """The ids at which answers begin, end and are padded; every other parameter is left at its neutral default.

    `generate` fills whatever it is not told from the model's own configuration, so a repetition penalty there (1.05 in
    Qwen2.5-VL's) would change greedy answers unseen.
    """
    return GenerationConfig(
        bos_token_id=checkpoints.bos_token_id,
        eos_token_id=checkpoints.eos_token_id,
        pad_token_id=checkpoints.pad_token_id,
    )


class _Finite(LogitsProcessor):
    """Lets logits through as they are, if they are numbers."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """``scores``: (B, vocabulary); minus infinity forbids a token and is fine."""
        if bool(torch.isnan(scores).any() | torch.isposinf(scores).any()):
            raise NonFiniteLogits(
                f"the model gave logits that are NaN or infinite in {scores.dtype}; its answers mean nothing. Try "
                "--dtype bfloat16 or float32 where float16 overflows, otherwise look at the checkpoint"
            )
        return scores


def finite_logits() -> LogitsProcessorList:
    """For ``generate(logits_processor=...)``: raises `NonFiniteLogits` instead of choosing a token from NaN."""
    return LogitsProcessorList([_Finite()])
