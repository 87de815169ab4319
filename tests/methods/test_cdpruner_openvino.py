"""Oracle: a literal transcription of OpenVINO's selection: kernels, determinants, one token after the other."""

from __future__ import annotations

import numpy as np
import pytest

from ivcp_eval.interface import Signals
from ivcp_eval.interface.registry import make_method
from tests.methods.material import random_signals


def _cdpruner(signals: Signals, theta: float = 0.5) -> list[int]:
    """OpenVINO's selection: two kernels, greedy, without its epsilons."""
    states = signals.hidden.double().numpy()
    edges = set()
    for image in signals.images:
        edges |= {int(signals.visual[image.tokens[0]]) - 1, int(signals.visual[image.tokens[-1]]) + 1}
    mean = states[[place for place in signals.text.tolist() if place not in edges]].mean(0)
    kept = []
    for image in signals.images:
        middle = image.tokens.numel() // 2
        first = image.budget // 2
        for half, k in ((image.tokens[:middle], first), (image.tokens[middle:], image.budget - first)):
            own = states[signals.visual[half].numpy()]
            unit = own / np.linalg.norm(own, axis=1, keepdims=True)
            cosine = unit @ mean / np.linalg.norm(mean)
            r = (cosine - cosine.min()) / (cosine.max() - cosine.min())
            similar = unit @ unit.T
            kernel = (1 - theta) * similar + theta * r[:, None] * similar * r
            chosen: list[int] = []
            for _ in range(k):
                volume = {
                    i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])])
                    for i in range(len(own))
                    if i not in chosen
                }
                chosen.append(max(volume, key=lambda i: volume[i]))
            kept += [int(half[i]) for i in chosen]
    return sorted(kept)


@pytest.mark.parametrize("ratio", [0.2, 0.4])
@pytest.mark.parametrize("theta", [0.3, 0.5, 0.9])
def test_cdpruner_of_openvino(ratio: float, theta: float) -> None:
    for seed in range(4):
        signals = random_signals((4, 6), (3, 5), ratio=ratio, seed=seed, question=7)
        kept = make_method("cdpruner_openvino", {"theta": theta}).select(signals).keep
        assert kept.tolist() == _cdpruner(signals, theta)


def test_each_half_of_an_image_has_half_of_the_budget() -> None:
    signals = random_signals((5, 5), ratio=0.36)  # 9 of 25: 4 of the first 12, 5 of the other 13
    kept = make_method("cdpruner_openvino").select(signals).keep
    assert (int((kept < 12).sum()), int((kept >= 12).sum())) == (4, 5)
