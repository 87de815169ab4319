"""Writes the smallest checkpoints with published names and layout: random tensors, sharded safetensors, an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights of scale 1.5 / sqrt(fan-in); norms near one; embeddings of scale 1."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            made[name] = noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif "embed" in name:
            made[name] = noise
        else:
            made[name] = noise * 1.5 / noise[0].numel() ** 0.5
    return made


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], shards: int = 2) -> Path:
    """config.json, model-0000i-of-0000n.safetensors and model.safetensors.index.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    names, where = sorted(weights), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name].contiguous() for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def close(got: Tensor, wanted: Tensor) -> None:
    """Logits agree, and are of a scale at which an error would show."""
    assert float(wanted.std()) > 0.3
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
