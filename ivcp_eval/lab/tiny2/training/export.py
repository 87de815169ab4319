"""Write a trained model as a folder that stock transformers classes load."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
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

    Layers that are not ``active`` had no part in the training and pass their input on; what is written has only the
    active ones, which computes the same.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = deepcopy(state.model.config)
    text = config.text_config
    text.num_hidden_layers, text.layer_types = len(active), [text.layer_types[index] for index in active]
    place = {index: new for new, index in enumerate(active)}
    made, weights = Qwen2_5_VLForConditionalGeneration(config), {}
    with averaged(state.model, state.average):
        for name, value in state.model.state_dict().items():
            number = re.match(r"model\.language_model\.layers\.(\d+)\.", name)
            if number is None:
                weights[name] = value
            elif int(number[1]) in place:
                weights[f"model.language_model.layers.{place[int(number[1])]}.{name[number.end() :]}"] = value
        made.load_state_dict(weights)
    made = made.to(torch.bfloat16)
    finish_generation_config(made)
    made.save_pretrained(folder)
    save_processor(folder)
