"""``preset="official"`` on InternVL2.5's InternLM2 (as Llama, ``wqkv`` split) is the released code."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from model_adapters._internvl_checkpoint import language_tensors
from tests.engine.oracle.replay import ATTENTIONS, Case, cases, check

COMMON = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
    *("bos_token_id", "pad_token_id"),
]


@functools.lru_cache
def load(folder: Path, attention: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    facts = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": float(facts["rope_theta"])}
    config = LlamaConfig(**{key: facts[key] for key in COMMON}, rope_parameters=rope)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    heads = facts["num_attention_heads"], facts["num_key_value_heads"]
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(dict(pair for name, w in weights.items() for pair in language_tensors(name, w, *heads)))
    return model.eval()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("case", cases("internlm2"))
def test_internlm2(case: Case, attention: str) -> None:
    model = load(case.model_folder, attention)
    inputs = case.prompt_embeddings(model, case.image_embeddings())
    check(case, model, inputs, image_mask=case.span(case.facts["image_start"]), tiles=case.facts["tiles_wh"])
