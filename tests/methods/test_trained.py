"""Weights that methods read from a file: found, told apart, and refused in words where they do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ivcp_eval.interface.registry import make_method, parameters_of
from ivcp_eval.methods._trained import FrameRouter, Importance, Router, Scorer
from tests.methods.material import random_clips, random_signals


def written(path: Path, net: torch.nn.Module, part: str | None) -> Path:
    save_file(net.state_dict(), path, metadata=None if part is None else {"part": part})
    return path


def test_the_published_size() -> None:
    assert sum(p.numel() for p in Importance(1024).parameters()) == 525_313  # 0.53 M behind LLaVA-1.5's tower
    assert sum(p.numel() for p in Scorer(3584).parameters()) == 12_848_640  # Qwen2.5-VL-7B's, as released


def test_learnpruner_ranks_by_the_file(tmp_path: Path) -> None:
    signals = random_signals((4, 6), ratio=0.25, seed=2)
    states = torch.randn(signals.n_visual, 8, generator=torch.Generator().manual_seed(3))
    signals.vision = {"feature": states}
    net = Importance(8)
    file = written(tmp_path / "w.safetensors", net, "learnpruner")
    method = make_method("learnpruner", {"weights": str(file), "diverse": 0.0})
    assert method.select(signals).keep.tolist() == sorted(net.forward(states).topk(6).indices.tolist())
    assert method.tower_signals == {"feature"}
    first = parameters_of(method)["weights"]
    written(file, Importance(8), "learnpruner")
    assert parameters_of(method)["weights"] != first  # other weights are another row
    with torch.no_grad():
        assert method.select(signals).keep.numel() == 6  # and are the ones that are read


def test_idpruner_takes_visionselectors_scorer(tmp_path: Path) -> None:
    signals = random_signals((4, 6), ratio=0.25, seed=4)
    net = Scorer(signals.hidden.shape[-1])
    torch.nn.init.normal_(net.q_proj.weight)
    torch.nn.init.normal_(net.k_proj.weight)
    file = written(tmp_path / "w.safetensors", net, "visionselector")
    only = make_method("idpruner", {"weights": file, "importance": 1.0}).select(signals).keep
    assert only.tolist() == make_method("visionselector", {"weights": file}).select(signals).keep.tolist()


def test_dualcomp_splits_and_counts_by_its_router(tmp_path: Path) -> None:
    signals = random_signals((6, 6), ratio=0.25, seed=5)
    net = Router(signals.hidden.shape[-1])
    for share, rate in ((0.0, 0.5), (1.0, 0.1)):
        with torch.no_grad():
            net.state_dict()["layers.2.bias"].copy_(torch.tensor([share, rate]).logit(1e-6))
        file = written(tmp_path / f"{rate}.safetensors", net, "dualcomp")
        fixed = make_method("dualcomp", {"geometric": share}).select(signals)
        split = make_method("dualcomp", {"weights": file}).select(signals)
        assert torch.equal(split.keep, fixed.keep)
        counted = make_method("dualcomp", {"weights": file, "counts": "router"}).select(signals)
        assert counted.keep.numel() == round(36 * rate)
        assert not counted.exact
    with pytest.raises(ValueError, match="weights=FILE"):
        make_method("dualcomp", {"counts": "router"})


def test_videorouter_keeps_dense_what_its_router_calls_relevant(tmp_path: Path) -> None:
    """The router looks for the state that the question has; one frame has it, and keeps four times as much."""
    signals = random_clips((3, 4, 4), ratio=24 / 48, seed=1)
    width = signals.hidden.shape[-1]
    net = FrameRouter(width, width)
    with torch.no_grad():
        for layer in (net.q_proj, net.k_proj):
            layer.weight.copy_(torch.eye(width))
            layer.bias.zero_()
        net.threshold.fill_(0.5 * width**0.5)
    asked = signals.hidden[signals.question].mean(dim=0)
    signals.hidden = signals.hidden.index_copy(
        0, signals.visual[signals.images[1].tokens], asked.expand(signals.images[1].tokens.numel(), -1)
    )
    file = written(tmp_path / "w.safetensors", net, "videorouter")
    kept = make_method("videorouter", {"weights": file}).select(signals).keep
    assert torch.bincount(signals.image[kept], minlength=3).tolist() == [4, 16, 4]


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    signals = random_signals((4, 6), ratio=0.25, seed=2)
    signals.vision = {"feature": torch.randn(signals.n_visual, 8)}

    def select(file: Path) -> None:
        make_method("learnpruner", {"weights": file}).select(signals)

    with pytest.raises(ValueError, match="trained for states of width 6, this model's have 8"):
        select(written(tmp_path / "narrow.safetensors", Importance(6), "learnpruner"))
    with pytest.raises(ValueError, match="holds the weights of visionselector, not of learnpruner"):
        select(written(tmp_path / "other.safetensors", Scorer(8), "visionselector"))
    with pytest.raises(ValueError, match="does not hold the tensors of learnpruner"):
        select(written(tmp_path / "foreign.safetensors", Scorer(8), None))
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        select(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError):
        select(tmp_path / "none.safetensors")
