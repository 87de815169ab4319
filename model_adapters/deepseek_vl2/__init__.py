"""DeepSeek-VL2: SigLIP tiles, MLP projector, a DeepSeekMoE language model with multi-head latent attention (MLA).

Paper: https://arxiv.org/abs/2412.10302
Facts: https://github.com/deepseek-ai/DeepSeek-VL2 @ ef9f91e; docs/checkpoints/deepseek_vl2.md lists them with their
sources, and what is not known.
Classes: our own `modeling.DeepseekVL2ForConditionalGeneration` on native parts (transformers 5.14.1 and 5.23.0 tested).
"""

from __future__ import annotations

from model_adapters.deepseek_vl2.adapter import Adapter

__all__ = ["Adapter"]
