"""DualComp's router follows what keeping more or less does to the loss, not what a single token would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ivcp_eval.interface import Signals
from ivcp_eval.lab.training.command import configuration
from ivcp_eval.lab.training.examples import Generated
from ivcp_eval.lab.training.frozen import Frozen
from ivcp_eval.lab.training.parts.dualcomp import Part


@pytest.mark.parametrize(("enough", "rises"), [(0.25, True), (0.0, False)])
def test_rho_follows_the_loss(enough: float, rises: bool, frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token costs a little; below a quarter of them the answer is lost, which no single gate tells."""
    example = frozen.encoded(Generated("tiny", ["box"]).training(0))
    torch.manual_seed(0)
    part = Part(frozen, {**configuration("dualcomp", None)["part"], "price": 0.0}, example)
    signals = frozen.signals(example, part.watch, 0.5)

    def answer_loss(_encoded: Any, _method: Any, _ratio: float, gate: Callable[[Signals], Tensor]) -> Tensor:
        kept = gate(signals).mean()
        return 0.1 * kept + (kept < enough).float()

    monkeypatch.setattr(frozen, "answer_loss", answer_loss)
    for seed in range(4):  # lambda and rho are moved the same way and opposite ways
        part.net.zero_grad(set_to_none=True)
        loss, figures = part.loss(example, np.random.default_rng(seed), 0.0)
        loss.backward()
        assert figures["rho"] == pytest.approx(0.25)
        of_rho = float(part.net.layers[-1].bias.grad[1])  # type: ignore[index,union-attr]
        assert (of_rho < 0) == rises, seed
        assert of_rho != 0
