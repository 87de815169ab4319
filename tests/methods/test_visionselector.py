"""Oracle: the authors' scorer, which writes its mean out as that of a whole matrix."""

from __future__ import annotations

from pathlib import Path

import torch

from ivcp_eval.interface.registry import make_method
from ivcp_eval.methods._trained import Scorer
from tests.methods.material import random_signals
from tests.methods.test_trained import written


def test_visionselector_keeps_the_best_scores(tmp_path: Path) -> None:
    signals = random_signals((4, 6), (3, 3), ratio=0.4, seed=1)
    net = Scorer(signals.hidden.shape[-1])
    torch.nn.init.normal_(net.q_proj.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(net.k_proj.weight, generator=torch.Generator().manual_seed(1))
    for part in ("visionselector", None):  # the authors' files do not say what they are
        method = make_method("visionselector", {"weights": written(tmp_path / f"{part}.safetensors", net, part)})
        kept = method.select(signals).keep.tolist()
        wanted = []
        for image in signals.images:
            states = signals.hidden[signals.visual[image.tokens]]
            scores = (net.q_proj(states) @ net.k_proj(states).T / net.q_proj.out_features**0.5).mean(-1)
            wanted += sorted(image.tokens[scores.topk(image.budget).indices].tolist())
        assert kept == wanted
    assert not method.needs


def test_without_a_file_it_keeps_what_the_tower_attends_to() -> None:
    signals = random_signals((4, 6), (3, 3), ratio=0.4, seed=1)
    wanted = []
    for image in signals.images:
        wanted += sorted(image.tokens[signals.vision["received"][image.tokens].topk(image.budget).indices].tolist())
    assert make_method("visionselector").select(signals).keep.tolist() == wanted
