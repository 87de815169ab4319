"""Loads a published DeepSeek-VL2 checkpoint, and refuses to run on anything that does not fit exactly."""

from __future__ import annotations

import torch

from model_adapters._checkpoint import whole
from model_adapters.deepseek_vl2.configuration import DeepseekVL2Config
from model_adapters.deepseek_vl2.modeling import DeepseekVL2ForConditionalGeneration
from model_adapters.deepseek_vl2.processing import DeepseekVL2Processor


def load_checkpoint(
    source: str, *, revision: str | None, dtype: torch.dtype, device: str, attention: str
) -> tuple[DeepseekVL2ForConditionalGeneration, DeepseekVL2Processor]:
    """(model in eval mode, processor) from a local folder or hub id. ``device="auto"`` spreads over all GPUs.

    Raises:
        ValueError: a variant that is not implemented, a processor that cuts other views than the model takes, or
            tensors that are missing, left over or of another shape.
    """
    processor = DeepseekVL2Processor.from_pretrained(source, revision)
    config = DeepseekVL2Config.from_pretrained(source, revision=revision)
    if (processor.image_size, processor.view_side) != (config.vision_config.image_size, config.view_side):
        raise ValueError(
            f"the processor of {source} makes {processor.view_side}^2 tokens from views of {processor.image_size} "
            f"pixels, its model {config.view_side}^2 from {config.vision_config.image_size}"
        )
    config.image_token_id = processor.image_token_id  # the tokenizer is the authority; config.json does not say
    model, info = DeepseekVL2ForConditionalGeneration.from_pretrained(
        source,
        config=config,
        revision=revision,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        **({"device_map": "auto"} if device == "auto" else {}),
    )
    whole(source, info)
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return (model if device == "auto" else model.to(device)).eval(), processor
