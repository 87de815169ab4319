"""Replays recorded runs of the released IVC-Prune code: the same choice, logits, tokens and cache lengths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ivcp_eval
from tests.engine.tiny_models import WHERE

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """One recorded run: its entry in cases.json and its arrays."""

    family: str
    facts: dict[str, Any]

    def array(self, key: str) -> Tensor:
        """An array of the .npz file."""
        with np.load(DATA / self.family / f"{self.facts['name']}.npz") as arrays:
            return torch.from_numpy(arrays[key])

    @property
    def model_folder(self) -> Path:
        """Where the weights are."""
        return DATA / self.family / self.facts["model"]

    def span(self, start: int) -> Tensor:
        """(1, S) bool: the image, from column ``start``."""
        mask = torch.zeros(1, self.facts["seq_len"], dtype=torch.bool)
        mask[0, start : start + self.facts["image_len"]] = True
        return mask

    def image_embeddings(self) -> Tensor:
        """(N, E) recorded as a product of small integers, exact in float32."""
        return (self.array("img_a").int() @ self.array("img_b").int()).float() / 96

    def prompt_embeddings(self, model: Any, image: Tensor) -> dict[str, Tensor]:
        """What `generate` takes for text, ``image`` (N, E), text."""
        table = model.get_input_embeddings().weight.data.cpu()
        embeds = torch.cat([table[self.array("text_before")], image, table[self.array("text_after")]])[None]
        return {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.int64)}


def cases(family: str) -> list[Any]:
    """Every recorded run of a family, as pytest parameters."""
    import pytest

    recorded = json.loads((DATA / family / "cases.json").read_text())
    return [pytest.param(Case(family, facts), id=facts["name"]) for facts in recorded]


def check(case: Case, model: nn.Module, inputs: dict[str, Any], ratio: float = 0.5, **layout: Any) -> None:
    """Generate as recorded, on the test run's device, and compare everything that was recorded."""
    model.to(WHERE.device)
    inputs = {name: value.to(WHERE.device) for name, value in inputs.items()}
    steps = case.array("step_logits")
    options: dict[str, Any] = {
        "max_new_tokens": len(steps),
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    pruning = {"layer": case.facts["ivcp_k"], "preset": "official", **layout}
    with torch.no_grad(), ivcp_eval.prune(model, "ivc_prune", ratio=ratio, **pruning) as run:
        made: Any = model.generate(**inputs, **options)  # type: ignore[operator]
    assert run.kept[0].tolist() == case.array("keep_indices").tolist()
    torch.testing.assert_close(torch.cat(made.logits).cpu(), steps, atol=1e-4, rtol=0)
    assert made.sequences[0, -len(steps) :].tolist() == case.array("greedy_tokens").tolist()
    assert run.kv_lengths == case.facts["kv_lengths_end"]
    # The recorded unpruned run differs, so the comparison above cannot pass without pruning; and our baseline is it.
    whole: Any = model.generate(**inputs, **options)  # type: ignore[operator]
    torch.testing.assert_close(torch.cat(whole.logits)[0].cpu(), case.array("full_step_logits")[0], atol=1e-4, rtol=0)
    assert (torch.cat(whole.logits)[0].cpu() - steps[0]).abs().max() > 1e-2
