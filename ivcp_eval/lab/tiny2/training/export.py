"""Write a trained model as a folder that stock transformers classes load."""

from __future__ import annotations

from pathlib import Path

import torch

from ivcp_eval.lab.tiny.processor import finish_generation_config
from ivcp_eval.lab.tiny2.processor import save_processor
from ivcp_eval.lab.tiny2.training.state import State


def export(state: State, folder: Path) -> None:
    """Write the averaged model of ``state`` in bfloat16 with its processor to ``folder`` (created if missing)."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    copy = Qwen2_5_VLForConditionalGeneration(state.model.config)
    with state.averaged():
        copy.load_state_dict(state.model.state_dict())
    copy = copy.to(torch.bfloat16)
    finish_generation_config(copy)
    copy.save_pretrained(folder)
    save_processor(folder)
