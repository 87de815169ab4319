"""Oracle: the compressor's encoder layer written out, head by head, on the weights of its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods._at_input import places
from ivcp_eval.methods.evocomp import HEADS, Compressor
from tests.methods.material import random_signals
from tests.methods.test_trained import written


def normed(states: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = states - states.mean(dim=1, keepdim=True)
    return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * scale + shift


def logits_of(weights: dict[str, Tensor], visual: Tensor, words: Tensor, where: Tensor) -> Tensor:
    """(N,) logits of the visual tokens, with nothing but sums and products."""

    def linear(name: str, states: Tensor) -> Tensor:
        return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def entered(states: Tensor, kind: int) -> Tensor:
        width = states.shape[1]
        return linear("enter", normed(states, torch.ones(width), torch.zeros(width))) + weights["kind"][kind]

    states = torch.cat((entered(visual, 0) + linear("place", where), entered(words, 1)))
    norms = [(weights[f"layer.norm{n}.weight"], weights[f"layer.norm{n}.bias"]) for n in (1, 2)]
    projected = normed(states, *norms[0]) @ weights["layer.self_attn.in_proj_weight"].T
    query, key, value = (projected + weights["layer.self_attn.in_proj_bias"]).chunk(3, dim=1)
    heads = []
    for q, k, v in zip(*(part.chunk(HEADS, dim=1) for part in (query, key, value)), strict=True):
        heads.append((q @ k.T / q.shape[1] ** 0.5).softmax(dim=1) @ v)
    states = states + linear("layer.self_attn.out_proj", torch.cat(heads, dim=1))
    inner = torch.nn.functional.gelu(linear("layer.linear1", normed(states, *norms[1])))
    states = states + linear("layer.linear2", inner)
    return linear("leave", states[: len(visual)])[:, 0]


def test_the_highest_logits_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    signals = random_signals((4, 6), (3, 3), ratio=0.4, seed=5)
    net = Compressor(signals.hidden.shape[-1], 16)
    torch.nn.init.normal_(net.kind)
    method = make_method("evocomp", {"weights": str(written(tmp_path / "w.safetensors", net, "evocomp"))})
    words, wanted = signals.hidden[signals.question], []
    for image in signals.images:
        visual = signals.hidden[signals.visual[image.tokens]]
        logits = logits_of(net.state_dict(), visual, words, places(image).float())
        wanted += sorted(image.tokens[logits.topk(image.budget).indices].tolist())
    assert method.select(signals).keep.tolist() == wanted


def test_without_a_file_what_is_like_the_question_stays() -> None:
    signals = random_signals((4, 6), ratio=0.25, seed=5)
    states, words = signals.hidden[signals.visual], signals.hidden[signals.question]
    alike = torch.nn.functional.cosine_similarity(states, words.mean(0)[None]).topk(6).indices
    assert make_method("evocomp").select(signals).keep.tolist() == sorted(alike.tolist())


def test_weights_for_another_width_are_refused(tmp_path: Path) -> None:
    signals = random_signals((4, 6), ratio=0.25, seed=5)
    narrow = make_method("evocomp", {"weights": written(tmp_path / "n.safetensors", Compressor(8, 16), "evocomp")})
    with pytest.raises(ValueError, match="trained for states of width 8"):
        narrow.select(signals)
