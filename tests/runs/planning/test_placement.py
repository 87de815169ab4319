"""Pruning where the model does not sit in one piece on one device: accelerate's dispatch with layers on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import ivcp_eval
from ivcp_eval.interface.registry import adapter
from ivcp_eval.lab.model_check import QUESTION, picture
from ivcp_eval.lab.tiny.processor import build_random


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_random(path, seed=2)
    return path


def _generate(model: torch.nn.Module, folder: Path) -> tuple[torch.Tensor, list[int]]:
    wired = adapter("qwen2_5_vl")
    inputs = wired.encode(wired.load_processor(str(folder)), [[{"image": picture((224, 168))}, {"text": QUESTION}]])
    with torch.inference_mode(), ivcp_eval.prune(model, "ivc_prune", ratio=0.5, layer=2) as run:
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack(out.logits), run.kv_lengths


def test_layers_offloaded_to_disk_give_the_same_bits(folder: Path, tmp_path: Path) -> None:
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    n_layers = len(whole.model.language_model.layers)
    places = {"model.visual": "cpu", "lm_head": "cpu"}
    places |= {f"model.language_model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
    # Layers around the cut on disk: their weights are on the meta device until they run.
    places |= {
        f"model.language_model.layers.{i}": "disk" if i in (1, 2, n_layers - 1) else "cpu" for i in range(n_layers)
    }
    spread = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, device_map=places, offload_folder=str(tmp_path / "offload")
    ).eval()
    assert {p.device.type for p in spread.parameters()} == {"cpu", "meta"}
    expected, lengths = _generate(whole, folder)
    logits, spread_lengths = _generate(spread, folder)
    assert torch.equal(logits, expected)
    assert spread_lengths == lengths


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_budget(folder: Path, dtype: torch.dtype) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval()
    logits, lengths = _generate(model, folder)
    assert logits.isfinite().all()
    assert len(set(lengths)) == 1
