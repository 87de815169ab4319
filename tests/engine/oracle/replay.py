"""Replays recorded runs of the released IVC-Prune code: the same choice, logits, tokens and cache lengths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ivcp_eval
from tests.engine.contract.checks import close, same_generation
from tests.engine.tiny_models import WHERE

DATA = Path(__file__).parent / "data"
ATTENTIONS = ("eager", "sdpa") if WHERE.attention == "sdpa" else (WHERE.attention,)
SAME_IN_HALF = 0.9  # of the recorded tokens, at least so many stay


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
    """Generate as recorded, on the test run's device and in its precision, and compare everything that was recorded.

    In half precision close calls may fall otherwise: nearly the same tokens stay, and answers are followed only where
    they are the same.
    """
    for parameter in model.parameters():  # buffers (rotary frequencies) stay float32, as loading a checkpoint does
        parameter.data = parameter.data.to(WHERE.device, WHERE.dtype)
    model.to(WHERE.device)
    inputs = {name: value.to(WHERE.device) for name, value in inputs.items()}
    inputs = {name: value.to(WHERE.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    steps, whole_steps, kept = (case.array(key) for key in ("step_logits", "full_step_logits", "keep_indices"))
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
    close(made.logits[0].cpu(), steps[:1], case.facts["name"])
    same = run.kept[0].tolist() == kept.tolist()
    if same:
        wanted = SimpleNamespace(sequences=case.array("greedy_tokens")[None], logits=steps[:, None].unbind())
        logits = [step.cpu() for step in made.logits]
        got = SimpleNamespace(sequences=made.sequences[:, -len(steps) :].cpu(), logits=logits)
        same_generation(got, wanted, case.facts["name"])
        assert run.kv_lengths == case.facts["kv_lengths_end"]
    if WHERE.dtype == torch.float32:
        assert same
    else:
        assert int(torch.isin(run.kept[0], kept).sum()) >= SAME_IN_HALF * kept.numel()
        assert run.kept[0].numel() < case.facts["seq_len"]
    # The recorded unpruned run differs, so the comparison above cannot pass without pruning; and our baseline is it.
    whole: Any = model.generate(**inputs, **options)  # type: ignore[operator]
    close(whole.logits[0].cpu(), whole_steps[:1], "unpruned")
    assert (whole_steps[0] - steps[0]).abs().max() > 1e-2
