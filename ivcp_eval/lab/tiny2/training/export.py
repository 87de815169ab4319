"""Write a trained model as a folder that stock transformers classes load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ivcp_eval.lab.tiny.processor import finish_generation_config
from ivcp_eval.lab.tiny.training.average import averaged
from ivcp_eval.lab.tiny2.processor import save_processor
from ivcp_eval.lab.tiny2.training.state import State


def silence(model: Any, active: Sequence[int]) -> None:
    """Let the decoder layers that are not ``active`` pass their input on unchanged."""
    with torch.no_grad():
        for index, layer in enumerate(model.model.language_model.layers):
            if index not in active:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()


def export(state: State, folder: Path, active: Sequence[int]) -> None:
    """Write the averaged model of ``state`` in bfloat16 with its processor to ``folder`` (created if missing).

    Layers that are not ``active`` had no part in the training and are silent in what is written.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    copy = Qwen2_5_VLForConditionalGeneration(state.model.config)
    with averaged(state.model, state.average):
        copy.load_state_dict(state.model.state_dict())
    silence(copy, active)
    copy = copy.to(torch.bfloat16)
    finish_generation_config(copy)
    copy.save_pretrained(folder)
    save_processor(folder)
